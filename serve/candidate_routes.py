"""The routes of those who decide about models: candidates, approvals, rejections, the way back."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path, Request

from serve.access import caller_of
from serve.api import PROBLEMS, Problem
from serve.model_decisions import ModelDecisions
from serve.training_api import (
    Approval,
    ApprovalOrder,
    Candidate,
    Rejection,
    RejectionOrder,
    RollbackAsked,
    RollbackOrder,
)

MAX_CANDIDATES = 100

Version = Annotated[str, Path(description="model_version of a candidate")]


def add_candidate_routes(api: FastAPI, decisions: ModelDecisions) -> None:
    """`GET /v1/candidates`, `POST /v1/candidates/{version}/approve` and `/reject`, `POST /v1/champion/rollback`."""
    bad = {status: PROBLEMS[status] for status in (400, 408, 413, 422)}

    def refused(**descriptions: str) -> dict:
        return {int(status[1:]): {"model": Problem, "description": text} for status, text in descriptions.items()} | bad

    @api.get("/v1/candidates", operation_id="list_candidates")
    async def candidates() -> list[Candidate]:
        """The newest 100 candidates, newest first, with their metrics on the gate split and who approved them."""
        return [Candidate.of(row) for row in await decisions.candidates(MAX_CANDIDATES)]

    @api.post(
        "/v1/candidates/{version}/approve",
        operation_id="approve_candidate",
        responses=refused(
            _404="no such candidate",
            _409="the candidate was promoted or rejected, or the caller asked for its training",
        ),
    )
    async def approve(request: Request, version: Version, order: ApprovalOrder) -> Approval:
        """Approves a candidate in the caller's name; a second approval of the same caller changes nothing. Who asked
        for the training may not approve what came of it: another person has to."""
        return Approval.of(await decisions.approve(version, caller_of(request).name, order.reason))

    @api.post(
        "/v1/candidates/{version}/reject",
        operation_id="reject_candidate",
        responses=refused(_404="no such candidate", _409="the candidate was promoted or rejected"),
    )
    async def reject(request: Request, version: Version, order: RejectionOrder) -> Rejection:
        """Rejects a candidate in the caller's name, for good: no approval of it counts any more, and no job promotes
        it."""
        return Rejection.of(await decisions.reject(version, caller_of(request).name, order.reason))

    @api.post(
        "/v1/champion/rollback",
        operation_id="ask_rollback",
        status_code=202,
        responses=refused(_409="this version is not the champion, or there is none before it"),
    )
    async def rollback(request: Request, order: RollbackOrder) -> RollbackAsked:
        """Asks for the champion before this one, in the caller's name. The job apply_decisions does it, and swaps the
        service; asked twice, it is done once."""
        return RollbackAsked.of(
            await decisions.ask_rollback(order.model_version, caller_of(request).name, order.reason)
        )
