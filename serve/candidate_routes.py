"""Approving what came of a training: the routes read what the jobs told the store, no registry."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from monitoring.prediction_log import PredictionLog
from serve.access import caller_of
from serve.api import PROBLEMS, Problem
from serve.errors import ApiError
from serve.reason import Reason
from serve.store_calls import StoreCalls, moment
from store.candidates import CANDIDATE, approve_candidate, find_candidate, list_candidates

MAX_CANDIDATES = 100

_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Approval(BaseModel):
    """One person's word for a candidate; the audit trail has it too."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_version": "4",
                    "approver": "Dr Weber",
                    "reason": "fewer missed melanomas",
                    "approved_at": "2024-05-01T09:30:00.000000Z",
                }
            ]
        },
    )

    model_version: str
    approver: str
    reason: str
    approved_at: datetime

    @classmethod
    def of(cls, row: dict[str, Any]) -> Approval:
        """The approval that a row of `approvals` stands for."""
        fields = {name: row[name] for name in ("model_version", "approver", "reason")}
        return cls(approved_at=moment(row["decided_at"]), **fields)


class Candidate(BaseModel):
    """A trained model that may become the champion."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_version": "4",
                    "digest": "9f2b" * 16,
                    "created_at": "2024-05-01T09:30:00.000000Z",
                    "state": "candidate",
                    "gate_metrics": {"none": {"auc": {"value": 0.91, "low": 0.88, "high": 0.93}}},
                    "approvals": [],
                }
            ]
        },
    )

    model_version: str
    digest: str = Field(description="sha256 of the bundle's manifest")
    created_at: datetime
    state: Literal["candidate", "promoted", "rejected"] = Field(
        description="promoted: it is, or was, the champion; rejected: the gate refused it, or it was rolled back"
    )
    gate_metrics: dict[str, Any] = Field(description="per context, measured on the gate split")
    approvals: list[Approval]

    @classmethod
    def of(cls, row: dict[str, Any]) -> Candidate:
        """The candidate that a row of `candidates` stands for."""
        fields = {name: row[name] for name in ("model_version", "digest", "state", "gate_metrics")}
        approvals = [Approval.of(approval) for approval in row["approvals"]]
        return cls(created_at=moment(row["created_at"]), approvals=approvals, **fields)


class ApprovalOrder(BaseModel):
    """Why a candidate should become the champion."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reason": "fewer missed melanomas"}]})

    reason: Reason


def add_candidate_routes(api: FastAPI, log: PredictionLog, retry_after_s: int) -> None:
    """`GET /v1/candidates` and `POST /v1/candidates/{version}/approve`."""
    records = StoreCalls(log, retry_after_s)
    bad = {status: PROBLEMS[status] for status in (400, 413, 422)}
    decided = {
        status: {"model": Problem, "description": description}
        for status, description in {404: "no such candidate", 409: "the candidate was promoted or rejected"}.items()
    }

    @api.get("/v1/candidates", operation_id="list_candidates")
    async def candidates() -> list[Candidate]:
        """The newest 100 candidates, newest first, with their metrics on the gate split and who approved them."""
        return [Candidate.of(row) for row in await records(list_candidates, MAX_CANDIDATES)]

    @api.post("/v1/candidates/{version}/approve", operation_id="approve_candidate", responses={**decided, **bad})
    async def approve(
        request: Request,
        version: Annotated[str, Path(description="model_version of a candidate")],
        order: ApprovalOrder,
    ) -> Approval:
        """Approves a candidate in the caller's name; a second approval of the same caller changes nothing."""
        candidate = await records(find_candidate, version) if _VERSION.fullmatch(version) else None
        if candidate is None:
            raise ApiError(404, "not_found", "version: no such candidate")
        if candidate["state"] != CANDIDATE:
            raise ApiError(409, "decided", f"version: candidate {version} is {candidate['state']} already")
        name = caller_of(request).name
        return Approval.of(await records(approve_candidate, candidate, name, order.reason))
