"""All lesions of one patient, compared with each other and ranked: which to look at first."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, File, Form, Request, UploadFile

from monitoring.prediction_log import PredictionRecord
from serve.access import caller_of
from serve.api import ERASED, PROBLEMS, Prediction, Problem
from serve.arrival import received_at
from serve.errors import ApiError, invalid_field
from serve.http_errors import check_form_fields
from serve.lesion import parse_key
from serve.prediction_routes import (
    ORIGIN_FIELDS,
    AcquiredAt,
    Device,
    IdempotencyKey,
    Institution,
    parse_lesions,
    parse_origin,
)
from serve.prediction_service import Outcome, PredictionService
from serve.triage_api import RankedLesion, RefusedLesion, Triage


def rank_lesions(outcomes: list[Outcome], model_version: str) -> Triage:
    """Orders a patient's outcomes, which are in the order of the request."""
    scored = [(index, outcome) for index, outcome in enumerate(outcomes) if not isinstance(outcome, ApiError)]
    risks = sorted((record.risk for _, (record, _) in scored if record.risk is not None), reverse=True)

    def place(item: tuple[int, tuple[PredictionRecord, dict[str, float]]]) -> tuple[bool, float, int]:
        risk = item[1][0].risk
        return (risk is not None, -(risk or 0.0), item[0])

    lesions = []
    for index, (record, stage_ms) in sorted(scored, key=place):
        rank = None if record.risk is None else risks.index(record.risk) + 1
        answer = Prediction.of(record, stage_ms)
        lesions.append(RankedLesion.model_construct(**dict(answer), index=index, rank=rank))
    refused = [
        RefusedLesion(index=index, error=outcome.error, detail=outcome.detail)
        for index, outcome in enumerate(outcomes)
        if isinstance(outcome, ApiError)
    ]
    return Triage(model_version=model_version, lesions=lesions, refused=refused)


def add_triage_routes(api: FastAPI, service: PredictionService) -> None:
    """`POST /v1/patients/triage`."""

    no_comparison = {"model": Problem, "description": "the model compares no lesions of a patient"}
    problems = PROBLEMS | ERASED | {409: no_comparison}

    @api.post("/v1/patients/triage", operation_id="triage_patient", responses=problems)
    async def triage(
        request: Request,
        images: Annotated[list[UploadFile], File(description="JPEG, PNG or WebP, each under this name")],
        patient_id: Annotated[str, Form(description="stored as a keyed hash only")],
        metadata: Annotated[str | None, Form(description="JSON list: one object or null per image")] = None,
        institution: Institution = None,
        device: Device = None,
        acquired_at: AcquiredAt = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Triage:
        """Ranks the lesions of one patient. Each is judged by itself and by how it stands out among the others.

        Send all of the patient's lesions: the comparison is only as good as what it sees. Each is stored as a
        prediction of its own.
        """
        await check_form_fields(request, ("images", "metadata", *ORIGIN_FIELDS), lists=("images",))
        origin = parse_origin(patient_id, institution, device, acquired_at)
        if origin.patient_id is None:
            raise invalid_field("patient_id: it is blank; expected whose lesions these are")
        files = [await image.read() for image in images]
        key, caller = parse_key(idempotency_key), caller_of(request).name
        lesions = parse_lesions(files, metadata, origin, key, caller, received_at(request), service)
        outcomes = await service.predict(lesions, "/v1/patients/triage", patient=True)
        versions = {outcome[0].model_version for outcome in outcomes if not isinstance(outcome, ApiError)}
        return rank_lesions(outcomes, next(iter(versions), service.model.reference.version))
