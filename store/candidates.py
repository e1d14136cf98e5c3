"""Candidates as the jobs tell the store of them: the service has no model registry at hand."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import approvals, candidates, now_us

CANDIDATE, PROMOTED, REJECTED = "candidate", "promoted", "rejected"
APPROVE = "approve"


def record_candidate(store: Store, model_version: str, digest: str, gate_metrics: dict[str, Any]) -> bool:
    """Stores a model version that was registered; returns False when it is known with this digest.

    Another digest under a known version means another registry: the new candidate takes the old one's place.
    """
    values = {"digest": digest, "created_at": now_us(), "gate_metrics": gate_metrics, "state": CANDIDATE}
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


def approve_candidate(store: Store, candidate: dict[str, Any], approver: str, reason: str) -> dict[str, Any]:
    """Records that a person approves a candidate, once per person; returns the approval's row.

    Args:
        candidate: as `find_candidate` gave it.
    """
    for row in candidate["approvals"]:
        if row["approver"] == approver:
            return row
    version = candidate["model_version"]
    gate = {"digest": candidate["digest"], "metrics": candidate["gate_metrics"]}
    number = store.record_approval(version, approver, reason, APPROVE, gate)
    with store.reading() as connection:
        return dict(connection.execute(sql.select(approvals).where(approvals.c.id == number)).mappings().one())


def open_approval(store: Store, model_version: str, digest: str) -> dict[str, Any] | None:
    """The newest approval of this version with this digest that no promotion has used yet, or None; whether or not its
    candidate is in the store. A champion that was rolled back must not come back on its old approval."""
    decided = approvals.c.decision.in_((APPROVE, "promote"))
    query = sql.select(approvals).where(approvals.c.model_version == model_version, decided)
    with store.reading() as connection:
        last = connection.execute(query.order_by(approvals.c.id.desc()).limit(1)).mappings().first()
    usable = last is not None and last["decision"] == APPROVE and last["gate"].get("digest") == digest
    return dict(last) if usable else None


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
