"""What the queue's routes answer, as models with examples."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.api import Prediction, Problem
from serve.times import moment

State = Literal["queued", "running", "done", "failed"]

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
