"""Which lesion a reader should look at next, and how many are left."""

from __future__ import annotations

import math
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


class ReviewQueue(NamedTuple):
    """`items`: what is to be read, at most `MAX_ORDERED` of each kind, in order; `done`: how many lesions this reader
    has read since."""

    items: list[QueueItem]
    done: int


def review_queue(store: Store, reader: str, since_us: int, skipped: frozenset[str] = frozenset()) -> ReviewQueue:
    """What this reader has not read and should: second readings behind open missed-cancer alarms, disagreements, what
    the model gave no answer for, then the rest, least certain first and, of equally certain ones, oldest first.

    Uncertain is what lies near the threshold, by the ratio of risk and threshold (both are small, so this orders as log
    odds do).

    Args:
        since_us: unread lesions received before are left alone, and what was read before is not counted.
        skipped: ids that come last.
    """
    done = sql.select(sql.func.count(labels.c.prediction_id.distinct())).where(
        labels.c.labeller == reader, labels.c.labelled_at >= since_us
    )
    with store.reading() as connection:
        found: dict[str, Why] = {}
        for why, query in _read_by_others(reader).items():
            for prediction_id in connection.execute(query).scalars():
                found.setdefault(prediction_id, why)
        unread = connection.execute(_unread(since_us)).all()
        num_done = connection.execute(done).scalar_one()
    for row in sorted(unread, key=_order):
        found.setdefault(row.id, "abstained" if row.abstained else "routine")
    items = [QueueItem(*item) for item in found.items()]
    return ReviewQueue(sorted(items, key=lambda item: item.prediction_id in skipped), num_done)


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


def _kept() -> sql.Exists:
    return sql.exists().where(images.c.hash == predictions.c.image_hash)


def _read_by_others(reader: str) -> dict[Why, sql.Select]:
    table = predictions.c
    read_by_me = sql.exists().where(labels.c.prediction_id == table.id, labels.c.labeller == reader)
    missed = sql.select(sql.func.substr(alarms.c.dedupe_key, _KEY_START)).where(
        alarms.c.kind == MISSED_CANCER, alarms.c.acknowledged_at.is_(None)
    )
    # A row of few among many: as an expression, the role leaves SQLite the index on ids.
    few = (
        sql.select(table.id)
        .where(_kept(), sql.func.coalesce(table.role, "") == "champion", ~read_by_me)
        .order_by(table.received_at, table.id)
        .limit(MAX_ORDERED)
    )
    return {
        "second_reading": few.where(table.id.in_(missed), table.id.in_(predictions_in_state("single"))),
        "adjudication": few.where(table.id.in_(predictions_in_state("disagreed"))),
    }


def _unread(since_us: int) -> sql.Select:
    table = predictions.c
    read = sql.exists().where(labels.c.prediction_id == table.id)
    return (
        sql.select(table.id, table.received_at, table.risk, table.threshold, table.abstained)
        # Where most are read, asking for that first spares SQLite, which keeps to this order, the look for the picture.
        .where(table.role == "champion", table.received_at >= since_us, ~read, _kept())
        .order_by(table.received_at.desc())
        .limit(MAX_ORDERED)
    )


def _order(row: sql.Row) -> tuple[bool, float, int, str]:
    distance = 0.0
    if not row.abstained:
        known = row.risk is not None and row.threshold is not None
        ratio = max(row.risk, _LEAST) / max(row.threshold, _LEAST) if known else math.inf
        distance = max(ratio, 1 / ratio)
    return not row.abstained, distance, row.received_at, row.id
