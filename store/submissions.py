"""The queue of submissions: accepted once, claimed by one worker at a time, finished once.

A submission is due when it is queued or running and its `leased_until` has passed: of a queued one that is the end of
its back-off, of a running one the end of the lease of a worker that did not come back.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.erased_patients import PatientErasedError, find_late, keep_erasures_out
from store.tables import images, now_us, submissions

QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"


class QueueFullError(Exception):
    """As many submissions wait as may."""


class OtherContentError(Exception):
    """This caller used the idempotency key for another submission."""


@dataclass(frozen=True)
class Claim:
    """A submission that is this worker's until `leased_until` (microseconds since the epoch, UTC).

    `attempts` counts this one. Each claim of a submission ends later than the one before, so the lease tells them
    apart. At `claimed_at` the submission was there.
    """

    id: str
    caller: str
    attempts: int
    claimed_at: int
    leased_until: int
    request: dict[str, Any]


def find_submission(store: Store, submission_id: str) -> dict[str, Any] | None:
    """The row with this id, or None."""
    return _first(store, submissions.c.id == submission_id)


def check_submission(
    store: Store, caller: str, key: str | None, request: Mapping[str, Any], max_pending: int
) -> dict[str, Any] | None:
    """The row that this request has already; None where it would be a new one, for which there is room.

    Raises:
        QueueFullError, OtherContentError: as `insert_submission`.
    """
    with store.reading() as connection:
        return _known_or_room(connection, caller, key, request, max_pending)


def insert_submission(
    store: Store,
    caller: str,
    key: str | None,
    request: Mapping[str, Any],
    image_row: Mapping[str, Any],
    max_pending: int,
    received_at: int | None = None,
) -> tuple[dict[str, Any], bool]:
    """Queues a request, with the row of its picture; returns the submission's row and whether it is new.

    The same request under the same key is the same submission, whatever has become of it. On PostgreSQL, requests that
    commit at the same moment may pass `max_pending` by their number.

    Args:
        request: what is to be scored, as JSON; `image_hash` and `patient_hmac` are its keys.
        received_at: microseconds since the epoch; None: now.

    Raises:
        PatientErasedError: since then; the picture's file is the caller's to remove.
        QueueFullError: `max_pending` submissions are queued.
        OtherContentError: the key stands for another request.
    """
    row = {
        "id": uuid.uuid4().hex,
        "idempotency_key": key,
        "caller": caller,
        "state": QUEUED,
        "submitted_at": now_us() if received_at is None else received_at,
        "attempts": 0,
        "request": dict(request),
    }
    with store.writing() as connection:
        keep_erasures_out(connection)
        if find_late(connection, [{**request, "received_at": row["submitted_at"]}]):
            raise PatientErasedError("the patient was erased after this submission was received")
        known = _known_or_room(connection, caller, key, request, max_pending)
        if known is not None:
            return known, False
        connection.execute(store._insert(images).on_conflict_do_nothing(), dict(image_row))
        inserted = connection.execute(store._insert(submissions).values(**row).on_conflict_do_nothing()).rowcount
        # PostgreSQL: the key came in another transaction since.
        known = None if inserted else _known_or_room(connection, caller, key, request, max_pending)
        return (row, True) if known is None else (known, False)


def _known_or_room(
    connection: Connection, caller: str, key: str | None, request: Mapping[str, Any], max_pending: int
) -> dict[str, Any] | None:
    if key is not None:
        query = sql.select(submissions).where(submissions.c.caller == caller, submissions.c.idempotency_key == key)
        known = connection.execute(query).mappings().first()
        if known is not None:
            if known["request"] != dict(request):
                raise OtherContentError
            return dict(known)
    waiting = sql.select(submissions.c.id).where(submissions.c.state == QUEUED).limit(max_pending).subquery()
    if connection.execute(sql.select(sql.func.count()).select_from(waiting)).scalar_one() >= max_pending:
        raise QueueFullError
    return None


def count_pending(store: Store) -> dict[str, int]:
    """Submissions that are not settled, by state: `QUEUED` and `RUNNING`."""
    pending = submissions.c.state.in_((QUEUED, RUNNING))
    query = sql.select(submissions.c.state, sql.func.count()).where(pending).group_by(submissions.c.state)
    with store.reading() as connection:
        return {QUEUED: 0, RUNNING: 0} | {state: number for state, number in connection.execute(query)}


@dataclass(frozen=True)
class QueueState:
    """The queue at a moment.

    Attributes:
        oldest_at: when the oldest one that is not settled was submitted (microseconds UTC); None without any.
        failed: so many failed since the moment asked for.
    """

    queued: int
    running: int
    oldest_at: int | None
    failed: int


def queue_state(store: Store, failed_since_us: int) -> QueueState:
    """What waits, what is being scored, and what failed since `failed_since_us` (microseconds UTC)."""
    pending = count_pending(store)
    table = submissions.c
    oldest = sql.select(sql.func.min(table.submitted_at)).where(table.state.in_((QUEUED, RUNNING)))
    failed = sql.select(sql.func.count()).where(table.state == FAILED, table.finished_at >= failed_since_us)
    with store.reading() as connection:
        found = (connection.execute(oldest).scalar(), connection.execute(failed).scalar_one())
    return QueueState(pending[QUEUED], pending[RUNNING], *found)


def claim_submissions(
    store: Store, limit: int, lease_us: int, max_attempts: int, exhausted: str, now: int | None = None
) -> list[Claim]:
    """Takes up to `limit` due submissions, oldest first, for `lease_us`; no other worker gets them meanwhile.

    One whose worker died in its last attempt is failed instead.

    Args:
        exhausted: the error of such a one.
        now: microseconds since the epoch; None: the present.
    """
    now = now_us() if now is None else now
    due = (
        sql.select(submissions)
        .where(submissions.c.state.in_((QUEUED, RUNNING)))
        .where(sql.or_(submissions.c.leased_until.is_(None), submissions.c.leased_until <= now))
        .order_by(submissions.c.submitted_at, submissions.c.id)
        .limit(limit)
    )
    with store.reading() as connection:
        # Idle workers must not queue up for SQLite's one write lock.
        if connection.execute(due.with_only_columns(submissions.c.id).limit(1)).first() is None:
            return []
    with store.writing() as connection:
        # PostgreSQL locks the rows here; SQLite's writers have the whole database to themselves.
        rows = connection.execute(due.with_for_update(skip_locked=True)).mappings().all()
        spent = [row["id"] for row in rows if row["attempts"] >= max_attempts]
        rows = [row for row in rows if row["attempts"] < max_attempts]
        if spent:
            failed = {"state": FAILED, "error": exhausted, "leased_until": None, "finished_at": now}
            connection.execute(sql.update(submissions).where(submissions.c.id.in_(spent)).values(**failed))
        if rows:
            taken = sql.update(submissions).where(submissions.c.id.in_([row["id"] for row in rows]))
            attempts = submissions.c.attempts + 1
            connection.execute(taken.values(state=RUNNING, leased_until=now + lease_us, attempts=attempts))
        return [
            # Not before it came in, whatever the clocks of two machines say: an erasure in between was not its own.
            Claim(
                row["id"],
                row["caller"],
                row["attempts"] + 1,
                max(now, row["submitted_at"]),
                now + lease_us,
                row["request"],
            )
            for row in rows
        ]


def finish_submission(store: Store, claim: Claim, result: dict[str, Any] | None, error: str | None = None) -> bool:
    """Ends a claimed submission: done with a result, failed without; False when the claim is no longer this worker's
    (its lease went to another, or the submission was erased)."""
    state = FAILED if result is None else DONE
    return _settle(store, claim, state=state, result=result, error=error, leased_until=None, finished_at=now_us())


def requeue_submission(store: Store, claim: Claim, not_before: int, error: str) -> bool:
    """Puts a claimed submission back, due at `not_before` (microseconds), with the error of this attempt; False as
    `finish_submission`."""
    return _settle(store, claim, state=QUEUED, leased_until=not_before, error=error)


def _settle(store: Store, claim: Claim, **values: Any) -> bool:
    mine = sql.and_(
        submissions.c.id == claim.id,
        submissions.c.state == RUNNING,
        submissions.c.leased_until == claim.leased_until,
    )
    with store.writing() as connection:
        return connection.execute(sql.update(submissions).where(mine).values(**values)).rowcount == 1


def erase_submissions(connection: Connection, patient_hmac: str) -> int:
    """Removes a patient's submissions, in whatever state, in the caller's transaction; returns how many."""
    theirs = submissions.c.request["patient_hmac"].as_string() == patient_hmac
    return connection.execute(sql.delete(submissions).where(theirs)).rowcount


def images_of_submissions(connection: Connection, patient_hmac: str) -> set[str]:
    """Hashes of the pictures that a patient submitted; to be read before `erase_submissions`."""
    image_hash = submissions.c.request["image_hash"].as_string()
    theirs = submissions.c.request["patient_hmac"].as_string() == patient_hmac
    return set(connection.execute(sql.select(image_hash).where(theirs)).scalars())


def images_in_submissions(connection: Connection, hashes: Collection[str]) -> set[str]:
    """Those of the given picture hashes that any submission refers to: their files must stay."""
    image_hash = submissions.c.request["image_hash"].as_string()
    return set(connection.execute(sql.select(image_hash).where(image_hash.in_(hashes))).scalars())


def _first(store: Store, condition: sql.ColumnElement[bool]) -> dict[str, Any] | None:
    with store.reading() as connection:
        return next(map(dict, connection.execute(sql.select(submissions).where(condition)).mappings()), None)
