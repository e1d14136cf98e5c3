"""Orders and answers of the routes that lead to a new model: trainings, candidates, approvals."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.reason import Reason
from serve.times import moment

Trigger = Literal["manual", "drift", "schedule", "new_labels"]
RetrainState = Literal["requested", "running", "done", "failed"]

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
    state: RetrainState
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
                    "stage": None,
                    "attempt": 0,
                    "error": None,
                    "job_id": None,
                    "model_version": None,
                    "detail": {},
                }
            ]
        },
    )

    retrain_id: str
    state: RetrainState
    trigger: str
    reason: str
    requested_by: str
    requested_at: datetime
    finished_at: datetime | None
    stage: str | None = Field(description="prepare, warm_start, train, export or gate: where it is, or failed")
    attempt: int = Field(description="drivers that have worked on it")
    error: str | None = Field(description="why it failed")
    job_id: str | None = Field(description="the submitted job of the last attempt")
    model_version: str | None = Field(description="the candidate that came of it")
    detail: dict[str, Any] = Field(description="the causes, and in `stages` the result of each finished stage")

    @classmethod
    def of(cls, row: dict[str, Any]) -> Retraining:
        """The state that a row of `retrain_requests` stands for."""
        times = {name: row[name] and moment(row[name]) for name in ("requested_at", "finished_at")}
        plain = {name: row[name] for name in cls.model_fields if name in row}
        return cls(**{**plain, **times, "retrain_id": row["id"]})


class RetrainingPage(BaseModel):
    """Requests to train, newest first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"items": [Retraining.model_config["json_schema_extra"]["examples"][0]], "next_cursor": None}]
        }
    )

    items: list[Retraining]
    next_cursor: str | None


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


class RejectionOrder(BaseModel):
    """Why a candidate must not become the champion."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reason": "takes scars for melanomas"}]})

    reason: Reason


class Rejection(BaseModel):
    """One person's word against a candidate; the audit trail has it too."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_version": "4",
                    "rejected_by": "Dr Weber",
                    "reason": "takes scars for melanomas",
                    "rejected_at": "2024-05-01T09:30:00.000000Z",
                }
            ]
        },
    )

    model_version: str
    rejected_by: str
    reason: str
    rejected_at: datetime

    @classmethod
    def of(cls, row: dict[str, Any]) -> Rejection:
        """The rejection that a row of `approvals` stands for."""
        fields = {name: row[name] for name in ("model_version", "reason")}
        return cls(rejected_by=row["approver"], rejected_at=moment(row["decided_at"]), **fields)


class RollbackOrder(BaseModel):
    """Why the champion should be left for the one before it."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={"examples": [{"model_version": "4", "reason": "misses on site 4"}]},
    )

    model_version: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the champion to leave")
    reason: Reason


class RollbackAsked(BaseModel):
    """The rollback that waits for its job."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_version": "4",
                    "asked_by": "Dr Weber",
                    "reason": "misses on site 4",
                    "asked_at": "2024-05-01T09:30:00.000000Z",
                }
            ]
        },
    )

    model_version: str = Field(description="the champion to leave")
    asked_by: str = Field(description="who asked first")
    reason: str
    asked_at: datetime

    @classmethod
    def of(cls, row: dict[str, Any]) -> RollbackAsked:
        """The order that a row of `approvals` stands for."""
        fields = {name: row[name] for name in ("model_version", "reason")}
        return cls(asked_by=row["approver"], asked_at=moment(row["decided_at"]), **fields)
