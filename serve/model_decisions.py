"""What people decide about models, for routes and pages: what the jobs told the store is read, no registry."""

from __future__ import annotations

import re
from typing import Any

from monitoring.prediction_log import PredictionLog
from serve.errors import ApiError
from serve.store_calls import StoreCalls
from store.candidates import (
    APPROVAL_REFUSED,
    CANDIDATE,
    DecidedError,
    approve_candidate,
    find_candidate,
    is_one_of,
    list_candidates,
    reject_candidate,
    requesters,
)
from store.champions import (
    Champion,
    NotChampionError,
    ask_rollback,
    champion_on_record,
    decisions,
    open_rollback,
)
from store.model_facts import Facts, find_model_facts
from store.refusals import record_refusal

_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ModelDecisions:
    """The store's side of approving, rejecting and going back.

    Every method raises ApiError 503 while the store does not answer.
    """

    def __init__(self, log: PredictionLog, retry_after_s: int):
        self._call = StoreCalls(log, retry_after_s, "candidates", threads=1)

    async def candidates(self, limit: int) -> list[dict[str, Any]]:
        """See `list_candidates`."""
        return await self._call(list_candidates, limit)

    async def champion(self) -> Champion | None:
        """See `champion_on_record`."""
        return await self._call(champion_on_record)

    async def facts(self, digests: set[str]) -> dict[str, Facts]:
        """See `find_model_facts`."""
        return await self._call(find_model_facts, digests)

    async def waiting_rollback(self) -> dict[str, Any] | None:
        """See `open_rollback`."""
        return await self._call(open_rollback)

    async def history(self, limit: int) -> list[dict[str, Any]]:
        """See `decisions`."""
        return await self._call(decisions, limit)

    async def requesters(self, version: str, digest: str) -> list[str]:
        """See `requesters`."""
        return await self._call(requesters, version, digest)

    async def approve(self, version: str, person: str, reason: str) -> dict[str, Any]:
        """Approves a candidate; returns the row, of the first time if this person has before.

        Raises:
            ApiError: 404; 409 `decided`; 409 `own_request`: the person asked for its training.
        """
        candidate = await self._candidate(version)
        asked = await self._call(requesters, version, candidate["digest"])
        if is_one_of(person, asked):
            detail = {"digest": candidate["digest"], "requested_by": asked}
            await self._call(record_refusal, person, APPROVAL_REFUSED, f"model/{version}", detail)
            raise ApiError(
                409,
                "own_request",
                f"version: {person} asked for candidate {version}; expected another person's approval",
            )
        return await self._decide(approve_candidate, candidate, person, reason)

    async def reject(self, version: str, person: str, reason: str) -> dict[str, Any]:
        """Rejects a candidate for good; returns the row.

        Raises:
            ApiError: 404; 409 `decided`.
        """
        return await self._decide(reject_candidate, await self._candidate(version), person, reason)

    async def ask_rollback(self, version: str, person: str, reason: str) -> dict[str, Any]:
        """Asks that a job leaves champion `version` for the one before it; returns the row of whoever asked first.

        Raises:
            ApiError: 409 `not_champion`: another version is, or there is none to go back to.
        """
        try:
            return await self._call(ask_rollback, version, person, reason)
        except NotChampionError as error:
            raise ApiError(409, "not_champion", f"model_version: {error}") from error

    async def _candidate(self, version: str) -> dict[str, Any]:
        candidate = await self._call(find_candidate, version) if _VERSION.fullmatch(version) else None
        if candidate is None:
            raise ApiError(404, "not_found", "version: no such candidate")
        if candidate["state"] != CANDIDATE:
            raise _decided(version, candidate["state"])
        return candidate

    async def _decide(self, decide: Any, candidate: dict[str, Any], person: str, reason: str) -> dict[str, Any]:
        try:
            return await self._call(decide, candidate, person, reason)
        except DecidedError as error:
            raise _decided(candidate["model_version"], error.state) from error


def _decided(version: str, state: str) -> ApiError:
    return ApiError(409, "decided", f"version: candidate {version} is {state} already")
