"""The route that erases a patient."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import FastAPI, Request

from serve.access import caller_of
from serve.errors import invalid_field
from serve.lesion import parse_text
from serve.record_api import READ_PROBLEMS, ErasureReport
from serve.records import RecordService


def add_patient_routes(api: FastAPI, records: RecordService) -> None:
    """`DELETE /v1/patients/{patient_id}`."""

    # `:path`, because an id may have slashes.
    @api.delete("/v1/patients/{patient_id:path}", operation_id="erase_patient", responses=READ_PROBLEMS)
    async def erase_patient(request: Request, patient_id: str) -> ErasureReport:
        """Removes a patient's records, labels and pictures for good; the audit trail keeps that it was done.

        After a 503 or a lost answer, send it again: it goes on where it was interrupted.
        """
        text = parse_text(patient_id, "patient_id")
        if text is None:
            raise invalid_field("patient_id: blank; expected a patient's id")
        return ErasureReport(**asdict(await records.erase_patient(text, caller_of(request).name)))
