"""Work on requests to train: one at a time, by a driver that holds a lease and says after each stage how far it is.

A request that is running has a lease. While it lasts nobody else takes a request; after it, the driver is gone, and the
next to come goes on with that request before any other. `attempt` tells the drivers of one request apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.retraining import DONE, FAILED, REQUESTED, RUNNING
from store.tables import now_us, retrain_requests

DRIVER = "retrain"
"""Who works on requests, in the audit trail."""

_table = retrain_requests.c


class RetrainTakenOverError(RuntimeError):
    """The request is another driver's by now, or has ended."""


@dataclass(frozen=True)
class RetrainClaim:
    """A request that is this driver's as long as it renews the lease.

    Attributes:
        attempt: drivers that have taken it, this one counted.
        finished: results of the stages that earlier drivers, or this one, have finished.
    """

    id: str
    attempt: int
    trigger: str
    reason: str
    requested_by: str
    finished: dict[str, Any]


def claim_retraining(
    store: Store, lease_us: int, max_attempts: int, job_id: str | None = None, now: int | None = None
) -> RetrainClaim | None:
    """Takes the request of a driver that is gone, else the oldest that waits; None where there is none, or while
    another driver works.

    A request whose driver is gone for the `max_attempts`-th time fails instead.

    Args:
        job_id: the submitted job that this driver runs in.
        now: microseconds since the epoch; None: the present.
    """
    now = now_us() if now is None else now
    with store.writing() as connection:
        _alone(connection)
        query = sql.select(retrain_requests).where(_table.state.in_((REQUESTED, RUNNING)))
        rows = connection.execute(query.order_by(_table.requested_at, _table.id)).mappings().all()
        running = [row for row in rows if row["state"] == RUNNING]
        if any(row["leased_until"] is not None and row["leased_until"] > now for row in running):
            return None
        left = []
        for row in running:
            if row["attempt"] >= max_attempts:
                error = f"its driver ended without a word in each of {row['attempt']} attempts"
                _end(store, connection, row["id"], row["stage"], FAILED, error=error, finished_at=now)
            else:
                left.append(row)
        due = left + [row for row in rows if row["state"] == REQUESTED]
        if not due:
            return None
        row = due[0]
        attempt = row["attempt"] + 1
        values = {"state": RUNNING, "attempt": attempt, "leased_until": now + lease_us, "job_id": job_id}
        connection.execute(sql.update(retrain_requests).where(_table.id == row["id"]).values(**values))
        finished = row["detail"].get("stages", {})
        return RetrainClaim(row["id"], attempt, row["trigger"], row["reason"], row["requested_by"], finished)


def renew_lease(store: Store, claim: RetrainClaim, lease_us: int, now: int | None = None) -> None:
    """Says that the driver is alive.

    Raises:
        RetrainTakenOverError: too late.
    """
    now = now_us() if now is None else now
    with store.writing() as connection:
        _update(connection, claim, leased_until=now + lease_us)


def begin_stage(store: Store, claim: RetrainClaim, stage: str) -> None:
    """Notes which stage the driver is in.

    Raises:
        RetrainTakenOverError: the request is another driver's.
    """
    with store.writing() as connection:
        _update(connection, claim, stage=stage)


def finish_stage(
    store: Store, claim: RetrainClaim, stage: str, result: dict[str, Any], model_version: str | None = None
) -> RetrainClaim:
    """Keeps a stage's result, in one transaction with its name; returns the claim with it.

    Args:
        result: as JSON, without NaN.
        model_version: the candidate, from the stage that made it.

    Raises:
        RetrainTakenOverError: the request is another driver's; the result is not kept.
    """
    with store.writing() as connection:
        # Written before it is read: with the row locked by a SELECT, the write after it would wait for a driver that
        # holds the table (`_alone`) and waits for the row.
        _update(connection, claim, stage=stage)
        detail = connection.execute(sql.select(_table.detail).where(_table.id == claim.id)).scalar_one()
        finished = {**detail.get("stages", {}), stage: result}
        values: dict[str, Any] = {"detail": {**detail, "stages": finished}}
        if model_version is not None:
            values["model_version"] = model_version
        _update(connection, claim, **values)
    return RetrainClaim(**{**vars(claim), "finished": finished})


def finish_retraining(store: Store, claim: RetrainClaim) -> None:
    """Ends a request that led to a candidate, with its audit entry.

    Raises:
        RetrainTakenOverError: the request is another driver's.
    """
    with store.writing() as connection:
        _update(connection, claim, error=None)
        _end(store, connection, claim.id, None, DONE, finished_at=now_us())


def fail_retraining(store: Store, claim: RetrainClaim, stage: str, error: str) -> None:
    """Ends a request whose `stage` failed, with its audit entry, which does not quote the error.

    Raises:
        RetrainTakenOverError: the request is another driver's.
    """
    with store.writing() as connection:
        _update(connection, claim, error=error)
        _end(store, connection, claim.id, stage, FAILED, finished_at=now_us())


def retrainings_failed_since(store: Store, since: int) -> list[dict[str, Any]]:
    """Rows of requests that failed at or after `since` (microseconds), oldest first."""
    query = sql.select(retrain_requests).where(_table.state == FAILED, _table.finished_at >= since)
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query.order_by(_table.finished_at)).mappings()]


def _alone(connection: Connection) -> None:
    # Two drivers that look at once would both see that none works. SQLite's writers have the database to themselves.
    if connection.dialect.name == "postgresql":
        connection.execute(sql.text("LOCK TABLE retrain_requests IN SHARE ROW EXCLUSIVE MODE"))


def _update(connection: Connection, claim: RetrainClaim, **values: Any) -> None:
    mine = sql.and_(_table.id == claim.id, _table.state == RUNNING, _table.attempt == claim.attempt)
    if connection.execute(sql.update(retrain_requests).where(mine).values(**values)).rowcount != 1:
        raise RetrainTakenOverError(
            f"retraining {claim.id}: attempt {claim.attempt} is not the one at work any more; it stops"
        )


def _end(store: Store, connection: Connection, request_id: str, stage: str | None, state: str, **values: Any) -> None:
    mine = sql.update(retrain_requests).where(_table.id == request_id)
    connection.execute(mine.values(state=state, stage=stage, leased_until=None, **values))
    query = sql.select(_table.trigger, _table.model_version).where(_table.id == request_id)
    facts = dict(connection.execute(query).mappings().one())
    detail = {**facts} if stage is None else {**facts, "stage": stage}
    store._append_audit(connection, DRIVER, f"retrain_{state}", f"retrain/{request_id}", detail)
