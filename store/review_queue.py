"""Which lesion a reader should look at next, and how many are left."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import sqlalchemy as sql

from store.database import Store
from store.label_consensus import predictions_in_state
from store.labels import MISSED_CANCER, missed_cancer_key
from store.tables import alarms, images, labels, predictions

Why = Literal["second_reading", "adjudication", "abstained", "routine"]

# So many of the newest unread lesions are put in order; a longer queue is never worked off in one order anyway, and
# putting a million in order would take seconds with each lesion.
MAX_ORDERED = 2_000
_KEY_START = len(missed_cancer_key("")) + 1
_LEAST = 1e-9


class QueueItem(NamedTuple):
    """A lesion to be read, and why: a reader called it cancer and the model did not; readers disagree; the model gave
    no answer; or none of these."""

    prediction_id: str
    why: Why


class QueueCounts(NamedTuple):
    """`done`: lesions that this reader has read since; `left`: those to be read, at most `MAX_ORDERED` of each kind."""

    done: int
    left: int


def review_queue(store: Store, reader: str, since_us: int, skipped: frozenset[str] = frozenset()) -> list[QueueItem]:
    """What this reader has not read and should: second readings behind open missed-cancer alarms, disagreements, what
    the model gave no answer for, then the rest, least certain first and, of equally certain ones, oldest first.

    Uncertain is what lies near the threshold, by the ratio of risk and threshold (both are small, so this orders as log
    odds do).

    Args:
        since_us: unread lesions received before are left alone.
        skipped: ids that come last.
    """
    with store.reading() as connection:
        found: dict[str, Why] = {}
        for why, query in _queries(reader, since_us).items():
            for prediction_id in connection.execute(query).scalars():
                found.setdefault(prediction_id, why)
    items = [QueueItem(*item) for item in found.items()]
    return sorted(items, key=lambda item: item.prediction_id in skipped)


def review_counts(store: Store, reader: str, since_us: int) -> QueueCounts:
    """How far a reader is. `done` counts from `since_us` on."""
    done = sql.select(sql.func.count(labels.c.prediction_id.distinct())).where(
        labels.c.labeller == reader, labels.c.labelled_at >= since_us
    )
    with store.reading() as connection:
        left: set[str] = set()
        for query in _queries(reader, since_us).values():
            left.update(connection.execute(query).scalars())
        return QueueCounts(connection.execute(done).scalar_one(), len(left))


def patient_lesions(store: Store, prediction_id: str, limit: int = 12) -> list[dict[str, Any]]:
    """Other lesions of the same patient whose picture is kept, newest first, without anything the model says of them:
    `id`, `received_at`, `metadata`. Empty for one without a patient."""
    own = sql.select(predictions.c.patient_hmac).where(predictions.c.id == prediction_id).scalar_subquery()
    query = (
        sql.select(predictions.c.id, predictions.c.received_at, predictions.c.metadata)
        .join(images, images.c.hash == predictions.c.image_hash)
        .where(predictions.c.patient_hmac == own, predictions.c.id != prediction_id)
        # As an expression, so that SQLite takes the index on patients.
        .where(sql.func.coalesce(predictions.c.role, "") == "champion")
        .order_by(predictions.c.received_at.desc(), predictions.c.id)
        .limit(limit)
    )
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def _queries(reader: str, since_us: int) -> dict[Why, sql.Select]:
    table = predictions.c
    kept = sql.exists().where(images.c.hash == table.image_hash)
    read = sql.exists().where(labels.c.prediction_id == table.id)
    read_by_me = sql.exists().where(labels.c.prediction_id == table.id, labels.c.labeller == reader)
    missed = sql.select(sql.func.substr(alarms.c.dedupe_key, _KEY_START)).where(
        alarms.c.kind == MISSED_CANCER, alarms.c.acknowledged_at.is_(None)
    )
    base = sql.select(table.id).where(kept).limit(MAX_ORDERED)
    # A row of few among many: as an expression, the role leaves SQLite the index on ids.
    few = base.where(sql.func.coalesce(table.role, "") == "champion", ~read_by_me).order_by(table.received_at, table.id)
    newest = (
        sql.select(table.id, table.received_at, table.risk, table.threshold, table.abstained)
        .where(table.role == "champion", table.received_at >= since_us, kept, ~read)
        .order_by(table.received_at.desc())
        .limit(MAX_ORDERED)
        .subquery()
    )
    unread = newest.c
    risk, threshold = (sql.case((value < _LEAST, _LEAST), else_=value) for value in (unread.risk, unread.threshold))
    distance = sql.case((risk > threshold, risk / threshold), else_=threshold / risk)
    return {
        "second_reading": few.where(table.id.in_(missed), table.id.in_(predictions_in_state("single"))),
        "adjudication": few.where(table.id.in_(predictions_in_state("disagreed"))),
        "abstained": sql.select(unread.id).where(unread.abstained).order_by(unread.received_at, unread.id),
        "routine": sql.select(unread.id).where(~unread.abstained).order_by(distance, unread.received_at, unread.id),
    }
