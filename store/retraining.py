"""Requests to train again: at most one open request per dedupe key."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import now_us, retrain_requests

REQUESTED, RUNNING, DONE, FAILED = "requested", "running", "done", "failed"


def request_retraining(
    store: Store,
    dedupe_key: str,
    trigger: str,
    reason: str,
    requested_by: str,
    detail: dict[str, Any] | None = None,
    once: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Records a request, with its audit entry, unless one of this key is open; returns the open row and whether it is
    new.

    A request that ended gives its key free: it keeps the key with its own id behind it.

    Args:
        dedupe_key: at most 200 characters.
        once: a cause that asks once: where a request of this key is done, none is made, and that one is returned. A
            failed one gives its key free all the same.
    """
    table = retrain_requests.c
    row = {
        "id": uuid.uuid4().hex,
        "dedupe_key": dedupe_key,
        "trigger": trigger,
        "reason": reason,
        "requested_by": requested_by,
        "requested_at": now_us(),
        "state": REQUESTED,
        "attempt": 0,
        "leased_until": None,
        "job_id": None,
        "model_version": None,
        "detail": detail or {},
        "finished_at": None,
        "stage": None,
        "error": None,
    }
    with store.writing() as connection:
        if once:
            same = sql.or_(table.dedupe_key == dedupe_key, table.dedupe_key == dedupe_key + "/" + table.id)
            query = sql.select(retrain_requests).where(table.state == DONE, same).order_by(table.requested_at.desc())
            done = connection.execute(query.limit(1)).mappings().first()
            if done is not None:
                return dict(done), False
        ended = sql.and_(table.dedupe_key == dedupe_key, table.state.in_((DONE, FAILED)))
        retired = table.dedupe_key + "/" + table.id
        connection.execute(sql.update(retrain_requests).where(ended).values(dedupe_key=retired))
        statement = store._insert(retrain_requests).values(**row).on_conflict_do_nothing()
        if connection.execute(statement).rowcount == 1:
            subject = f"retrain/{row['id']}"
            store._append_audit(connection, requested_by, "retrain", subject, {"trigger": trigger, "reason": reason})
            return row, True
        query = sql.select(retrain_requests).where(table.dedupe_key == dedupe_key)
        return dict(connection.execute(query).mappings().one()), False


def find_retraining(store: Store, request_id: str) -> dict[str, Any] | None:
    """The request with this id, or None."""
    query = sql.select(retrain_requests).where(retrain_requests.c.id == request_id)
    with store.reading() as connection:
        return next(map(dict, connection.execute(query).mappings()), None)


def list_retrainings(store: Store, after: tuple[int, str] | None, limit: int) -> list[dict[str, Any]]:
    """At most `limit` requests, newest first.

    Args:
        after: (requested_at, id) of the last one of the page before.
    """
    table = retrain_requests.c
    query = sql.select(retrain_requests).order_by(table.requested_at.desc(), table.id.desc()).limit(limit)
    if after is not None:
        earlier = sql.or_(table.requested_at < after[0], table.id < after[1])
        query = query.where(table.requested_at <= after[0], earlier)
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def open_retrainings(store: Store) -> int:
    """How many requests wait or run."""
    query = sql.select(sql.func.count()).where(retrain_requests.c.state.in_((REQUESTED, RUNNING)))
    with store.reading() as connection:
        return connection.execute(query).scalar_one()
