"""Candidates as the jobs tell the store of them: the service has no model registry at hand."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import approvals, candidates, now_us, retrain_requests

CANDIDATE, PROMOTED, REJECTED = "candidate", "promoted", "rejected"
APPROVE, REJECT = "approve", "reject"
APPROVAL_REFUSED = "approval_refused"


def record_candidate(
    store: Store,
    model_version: str,
    digest: str,
    gate_metrics: dict[str, Any],
    *,
    requested_by: str | None = None,
    dataset_digest: str | None = None,
    retrain_id: str | None = None,
) -> bool:
    """Stores a model version that was registered; returns False when it is known with this digest.

    Another digest under a known version means another registry: the new candidate takes the old one's place.

    Args:
        requested_by: who asked for the training.
        dataset_digest: of the data set version that it was trained on.
        retrain_id: of the retraining request that it came from.
    """
    values = {"digest": digest, "created_at": now_us(), "gate_metrics": gate_metrics, "state": CANDIDATE}
    values |= {"requested_by": requested_by, "dataset_digest": dataset_digest, "retrain_id": retrain_id}
    statement = store._insert(candidates).values(model_version=model_version, **values)
    replace = statement.on_conflict_do_update(
        index_elements=["model_version"],
        set_={name: statement.excluded[name] for name in values},
        where=candidates.c.digest != digest,
    )
    with store.writing() as connection:
        return connection.execute(replace).rowcount == 1


def mark_candidate(store: Store, model_version: str, digest: str, state: str) -> bool:
    """Sets the state of a candidate; returns False where the store has none of this version and digest."""
    known = sql.and_(candidates.c.model_version == model_version, candidates.c.digest == digest)
    with store.writing() as connection:
        return connection.execute(sql.update(candidates).where(known).values(state=state)).rowcount == 1


def find_candidate(store: Store, model_version: str) -> dict[str, Any] | None:
    """The candidate's row with its `approvals` (see `list_candidates`), or None."""
    return next(iter(_rows(store, candidates.c.model_version == model_version)), None)


def list_candidates(store: Store, limit: int) -> list[dict[str, Any]]:
    """The newest candidates, newest first, each with its `approvals`: rows of people who approved it, oldest first."""
    return _rows(store, sql.true(), limit)


def _rows(store: Store, condition: sql.ColumnElement[bool], limit: int = 1) -> list[dict[str, Any]]:
    query = sql.select(candidates).where(condition)
    query = query.order_by(candidates.c.created_at.desc(), candidates.c.model_version.desc()).limit(limit)
    with store.reading() as connection:
        found = {row["model_version"]: {**row, "approvals": []} for row in connection.execute(query).mappings()}
        given = sql.select(approvals).where(approvals.c.decision == APPROVE, approvals.c.model_version.in_(list(found)))
        for row in connection.execute(given.order_by(approvals.c.id)).mappings():
            # Of another registry's version of the same number, see `record_candidate`.
            if row["gate"].get("digest") == found[row["model_version"]]["digest"]:
                found[row["model_version"]]["approvals"].append(dict(row))
    return list(found.values())


class DecidedError(Exception):
    """A candidate that is none any more; `state` says what became of it."""

    def __init__(self, state: str):
        super().__init__(state)
        self.state = state


def approve_candidate(store: Store, candidate: dict[str, Any], approver: str, reason: str) -> dict[str, Any]:
    """Records that a person approves a candidate, once per person; returns the approval's row.

    Args:
        candidate: as `find_candidate` gave it.

    Raises:
        DecidedError: it was promoted or rejected meanwhile.
    """
    for row in candidate["approvals"]:
        if row["approver"] == approver:
            return row
    return _decide(store, candidate, APPROVE, approver, reason)


def reject_candidate(store: Store, candidate: dict[str, Any], person: str, reason: str) -> dict[str, Any]:
    """Records that a person rejects a candidate, for good: approvals of it count no more. Returns the decision's row.

    Raises:
        DecidedError: it was promoted or rejected meanwhile.
    """
    return _decide(store, candidate, REJECT, person, reason)


def _decide(store: Store, candidate: dict[str, Any], decision: str, person: str, reason: str) -> dict[str, Any]:
    version, digest = candidate["model_version"], candidate["digest"]
    known = sql.and_(candidates.c.model_version == version, candidates.c.digest == digest)
    gate = {"digest": digest, "metrics": candidate["gate_metrics"]}
    with store.writing() as connection:
        # Locked: of two people who decide at once the second sees what the first did.
        state = connection.execute(sql.select(candidates.c.state).where(known).with_for_update()).scalar()
        if state != CANDIDATE:
            raise DecidedError(state or REJECTED)
        if decision == REJECT:
            connection.execute(sql.update(candidates).where(known).values(state=REJECTED))
        number = store._record_decision(connection, version, person, reason, decision, gate)
        return dict(connection.execute(sql.select(approvals).where(approvals.c.id == number)).mappings().one())


def find_rejection(store: Store, model_version: str, digest: str) -> dict[str, Any] | None:
    """A person's rejection of this version with this digest, or None."""
    table = approvals.c
    query = sql.select(approvals).where(table.model_version == model_version, table.decision == REJECT)
    with store.reading() as connection:
        rows = connection.execute(query.order_by(table.id)).mappings()
        return next((dict(row) for row in rows if row["gate"].get("digest") == digest), None)


def is_one_of(name: str, names: Collection[str]) -> bool:
    """Whether a person is among these; letter case, spaces and Unicode forms of a name make no second person."""
    return _same(name) in {_same(other) for other in names}


def _same(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def requesters(store: Store, model_version: str, digest: str) -> list[str]:
    """Who asked for the training of this version with this digest, and so may not approve it; empty where unknown."""
    mine = sql.and_(candidates.c.model_version == model_version, candidates.c.digest == digest)
    asked = candidates.outerjoin(retrain_requests, candidates.c.retrain_id == retrain_requests.c.id)
    query = sql.select(candidates.c.requested_by, retrain_requests.c.requested_by).select_from(asked).where(mine)
    with store.reading() as connection:
        return sorted({name for row in connection.execute(query) for name in row if name})


def open_approval(store: Store, model_version: str, digest: str, not_by: Collection[str] = ()) -> dict[str, Any] | None:
    """The newest approval of this version with this digest that no promotion has used yet, or None; whether or not its
    candidate is in the store. A champion that was rolled back must not come back on its old approval.

    Args:
        not_by: people whose approvals do not count, see `requesters`.
    """
    decided = approvals.c.decision.in_((APPROVE, "promote"))
    query = sql.select(approvals).where(approvals.c.model_version == model_version, decided)
    with store.reading() as connection:
        for row in connection.execute(query.order_by(approvals.c.id.desc())).mappings():
            if row["decision"] != APPROVE or row["gate"].get("digest") != digest:
                return None
            if not is_one_of(row["approver"], not_by):
                return dict(row)
    return None


def note_origin(
    store: Store,
    model_version: str,
    digest: str,
    dataset_digest: str | None,
    requested_by: str | None,
    retrain_id: str | None,
) -> bool:
    """Notes where a candidate comes from; returns False where the store has none of this version and digest."""
    known = sql.and_(candidates.c.model_version == model_version, candidates.c.digest == digest)
    origin = {"dataset_digest": dataset_digest, "requested_by": requested_by, "retrain_id": retrain_id}
    with store.writing() as connection:
        return connection.execute(sql.update(candidates).where(known).values(**origin)).rowcount == 1
