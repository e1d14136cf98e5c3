"""The routes of the queue: a picture in, 202 and an id; its prediction when it is done."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, Form, Path, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from serve.access import caller_of
from serve.api import PROBLEMS, Prediction, Problem
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
from serve.store_calls import moment
from serve.submission_queue import SubmissionQueue

State = Literal["queued", "running", "done", "failed"]

_ID = re.compile(r"[0-9a-f]{32}")
_EXAMPLE_ID = "0b9b6b3f6a3e4d55a2a3bb3d9e1c7f10"


class SubmissionAccepted(BaseModel):
    """The picture and what was said of it are on disk; it will be scored, also after a restart."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "submission_id": _EXAMPLE_ID,
                    "state": "queued",
                    "status_url": f"/v1/submissions/{_EXAMPLE_ID}",
                }
            ]
        }
    )

    submission_id: str
    state: State = Field(description="a repeat under the same Idempotency-Key shows what has become of the first")
    status_url: str


class Submission(BaseModel):
    """What has become of a submission."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "submission_id": _EXAMPLE_ID,
                    "state": "queued",
                    "submitted_at": "2024-05-01T09:30:00.000000Z",
                    "finished_at": None,
                    "attempts": 1,
                    "result": None,
                    "error": {"error": "unavailable", "detail": "no answer within 30 s"},
                }
            ]
        }
    )

    submission_id: str
    state: State
    submitted_at: datetime
    finished_at: datetime | None = Field(description="when it was done or failed")
    attempts: int = Field(description="attempts to score it, the present one included")
    result: Prediction | None = Field(description="the answer that /v1/predict would have given, when done")
    error: Problem | None = Field(description="why it failed, or why the last attempt did")

    @classmethod
    def of(cls, row: dict[str, Any]) -> Submission:
        """The state that a row of `submissions` stands for."""
        return cls(
            submission_id=row["id"],
            state=row["state"],
            submitted_at=moment(row["submitted_at"]),
            finished_at=None if row["finished_at"] is None else moment(row["finished_at"]),
            attempts=row["attempts"],
            # Not validated: an older release may have written it.
            result=None if row["result"] is None else Prediction.model_construct(**row["result"]),
            error=None if row["error"] is None else Problem.model_validate(json.loads(row["error"])),
        )


def _status_url(submission_id: str) -> str:
    return f"/v1/submissions/{submission_id}"


def add_submission_routes(api: FastAPI, service: PredictionService, queue: SubmissionQueue) -> None:
    """`POST /v1/submissions` and `GET /v1/submissions/{id}`."""

    full = {"model": Problem, "description": "too many submissions wait; send it again after Retry-After"}
    unknown = {"model": Problem, "description": "no such submission of this caller"}

    @api.post("/v1/submissions", operation_id="submit", status_code=202, responses={**PROBLEMS, 429: full})
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
