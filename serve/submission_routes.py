"""The routes of the queue: a picture in, 202 and an id; its prediction when it is done."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import FastAPI, File, Form, Path, Request, Response, UploadFile

from serve.access import caller_of
from serve.api import ERASED, PROBLEMS, Problem
from serve.arrival import received_at
from serve.errors import ApiError
from serve.http_errors import check_form_fields
from serve.lesion import parse_json, parse_key, parse_metadata
from serve.prediction_routes import (
    ORIGIN_FIELDS,
    AcquiredAt,
    Device,
    IdempotencyKey,
    Institution,
    PatientId,
    parse_origin,
)
from serve.prediction_service import PredictionService
from serve.submission_api import Submission, SubmissionAccepted
from serve.submission_queue import SubmissionQueue

_ID = re.compile(r"[0-9a-f]{32}")


def _status_url(submission_id: str) -> str:
    return f"/v1/submissions/{submission_id}"


def add_submission_routes(api: FastAPI, service: PredictionService, queue: SubmissionQueue) -> None:
    """`POST /v1/submissions` and `GET /v1/submissions/{id}`."""

    full = {"model": Problem, "description": "too many submissions wait; send it again after Retry-After"}
    unknown = {"model": Problem, "description": "no such submission of this caller"}

    @api.post("/v1/submissions", operation_id="submit", status_code=202, responses={**PROBLEMS, **ERASED, 429: full})
    async def submit(
        request: Request,
        response: Response,
        image: Annotated[UploadFile, File(description="JPEG, PNG or WebP")],
        metadata: Annotated[str | None, Form(description="JSON object; see metadata_fields of /v1/model")] = None,
        patient_id: PatientId = None,
        institution: Institution = None,
        device: Device = None,
        acquired_at: AcquiredAt = None,
        idempotency_key: IdempotencyKey = None,
    ) -> SubmissionAccepted:
        """Queues one lesion, checked as /v1/predict checks it. 202 means that it is on disk and will be scored."""
        await check_form_fields(request, ("image", "metadata", *ORIGIN_FIELDS))
        record = None if metadata is None else parse_json(metadata, "metadata")
        row = await queue.accept(
            caller=caller_of(request).name,
            key=parse_key(idempotency_key),
            metadata=parse_metadata(record, service.model.task),
            origin=parse_origin(patient_id, institution, device, acquired_at),
            image=await image.read(),
            received_at=received_at(request),
        )
        url = _status_url(row["id"])
        response.headers["Location"] = url
        return SubmissionAccepted(submission_id=row["id"], state=row["state"], status_url=url)

    @api.get("/v1/submissions/{submission_id}", operation_id="get_submission", responses={404: unknown})
    async def submission(
        request: Request, submission_id: Annotated[str, Path(description="as POST /v1/submissions answered")]
    ) -> Submission:
        """State of a submission, and its prediction once it is done; for its caller, and for reviewers and above."""
        row = await queue.find(submission_id, caller_of(request)) if _ID.fullmatch(submission_id) else None
        if row is None:
            raise ApiError(404, "not_found", "submission_id: no such submission of this caller")
        return Submission.of(row)
