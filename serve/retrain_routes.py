"""Asking for a training: the routes record and show, the job `retrain` does the work."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from monitoring.prediction_log import PredictionLog
from serve.access import caller_of
from serve.api import PROBLEMS, Problem
from serve.errors import ApiError
from serve.reason import Reason
from serve.store_calls import StoreCalls, moment
from store.retraining import find_retraining, request_retraining

Trigger = Literal["manual", "drift", "schedule", "new_labels"]
State = Literal["requested", "running", "done", "failed"]

_ID = re.compile(r"[0-9a-f]{32}")
_EXAMPLE_ID = "5c1f7f1c9a0f4c1e8a52fd3c1b7d9e20"


class RetrainOrder(BaseModel):
    """Why a new model should be trained."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"reason": "new camera at site 4", "trigger": "manual"}]}
    )

    reason: Reason
    trigger: Trigger = "manual"


class RetrainAccepted(BaseModel):
    """The open request of this trigger."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"retrain_id": _EXAMPLE_ID, "state": "requested", "status_url": f"/v1/retrain/{_EXAMPLE_ID}"}]
        }
    )

    retrain_id: str
    state: State
    status_url: str


class Retraining(BaseModel):
    """What has become of a request to train."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "retrain_id": _EXAMPLE_ID,
                    "state": "requested",
                    "trigger": "manual",
                    "reason": "new camera at site 4",
                    "requested_by": "anonymous",
                    "requested_at": "2024-05-01T09:30:00.000000Z",
                    "finished_at": None,
                    "attempt": 0,
                    "job_id": None,
                    "model_version": None,
                    "detail": {},
                }
            ]
        },
    )

    retrain_id: str
    state: State
    trigger: str
    reason: str
    requested_by: str
    requested_at: datetime
    finished_at: datetime | None
    attempt: int = Field(description="trainings started for it")
    job_id: str | None = Field(description="the submitted job of the last attempt")
    model_version: str | None = Field(description="the candidate that came of it")
    detail: dict[str, Any] = Field(description="what the trigger, and the job, had to say")

    @classmethod
    def of(cls, row: dict[str, Any]) -> Retraining:
        """The state that a row of `retrain_requests` stands for."""
        times = {name: row[name] and moment(row[name]) for name in ("requested_at", "finished_at")}
        plain = {name: row[name] for name in cls.model_fields if name in row}
        return cls(**{**plain, **times, "retrain_id": row["id"]})


def add_retrain_routes(api: FastAPI, log: PredictionLog, retry_after_s: int) -> None:
    """`POST /v1/retrain` and `GET /v1/retrain/{id}`: they record and show; the job `retrain` does the work."""
    records = StoreCalls(log, retry_after_s)
    bad = {status: PROBLEMS[status] for status in (400, 413, 422)}
    open_already = {"model": RetrainAccepted, "description": "a request of this trigger is open: this one"}

    @api.post("/v1/retrain", operation_id="request_retraining", status_code=202, responses={200: open_already, **bad})
    async def retrain(request: Request, response: Response, order: RetrainOrder) -> RetrainAccepted:
        """Asks for a training. One request per trigger is open at a time; asking again answers with that one."""
        name = caller_of(request).name
        row, new = await records(request_retraining, order.trigger, order.trigger, order.reason, name)
        url = f"/v1/retrain/{row['id']}"
        response.status_code = 202 if new else 200
        response.headers["Location"] = url
        return RetrainAccepted(retrain_id=row["id"], state=row["state"], status_url=url)

    @api.get(
        "/v1/retrain/{retrain_id}",
        operation_id="get_retraining",
        responses={404: {"model": Problem, "description": "no such request"}},
    )
    async def retraining(retrain_id: Annotated[str, Path(description="as POST /v1/retrain answered")]) -> Retraining:
        """State of a request to train, and the candidate that came of it."""
        row = await records(find_retraining, retrain_id) if _ID.fullmatch(retrain_id) else None
        if row is None:
            raise ApiError(404, "not_found", "retrain_id: no such request")
        return Retraining.of(row)
