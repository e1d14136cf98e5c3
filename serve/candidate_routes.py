"""Approving what came of a training: the routes read what the jobs told the store, no registry."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import FastAPI, Path, Request

from monitoring.prediction_log import PredictionLog
from serve.access import caller_of
from serve.api import PROBLEMS, Problem
from serve.errors import ApiError
from serve.store_calls import StoreCalls
from serve.training_api import Approval, ApprovalOrder, Candidate
from store.candidates import (
    APPROVAL_REFUSED,
    CANDIDATE,
    approve_candidate,
    find_candidate,
    is_one_of,
    list_candidates,
    requesters,
)
from store.refusals import record_refusal

MAX_CANDIDATES = 100

_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


def add_candidate_routes(api: FastAPI, log: PredictionLog, retry_after_s: int) -> None:
    """`GET /v1/candidates` and `POST /v1/candidates/{version}/approve`."""
    records = StoreCalls(log, retry_after_s, "candidates", threads=1)
    bad = {status: PROBLEMS[status] for status in (400, 408, 413, 422)}
    decided = {
        status: {"model": Problem, "description": description}
        for status, description in {
            404: "no such candidate",
            409: "the candidate was promoted or rejected, or the caller asked for its training",
        }.items()
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
        """Approves a candidate in the caller's name; a second approval of the same caller changes nothing. Who asked
        for the training may not approve what came of it: another person has to."""
        candidate = await records(find_candidate, version) if _VERSION.fullmatch(version) else None
        if candidate is None:
            raise ApiError(404, "not_found", "version: no such candidate")
        if candidate["state"] != CANDIDATE:
            raise ApiError(409, "decided", f"version: candidate {version} is {candidate['state']} already")
        name = caller_of(request).name
        asked = await records(requesters, version, candidate["digest"])
        if is_one_of(name, asked):
            detail = {"digest": candidate["digest"], "requested_by": asked}
            await records(record_refusal, name, APPROVAL_REFUSED, f"model/{version}", detail)
            raise ApiError(
                409, "own_request", f"version: {name} asked for candidate {version}; expected another person's approval"
            )
        return Approval.of(await records(approve_candidate, candidate, name, order.reason))
