"""What the triggers of a retraining are judged by, as the store has it."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sql

from store.database import Store
from store.label_consensus import State, predictions_in_state
from store.retraining import DONE, FAILED
from store.tables import candidates, dataset_predictions, drift_reports, labels, predictions, retrain_requests


def drift_windows(store: Store, model_version: str, until: int) -> list[tuple[int, int, bool]]:
    """(start, end, drifted) of the windows of a model that ended by `until`, microseconds, oldest first.

    Of a window that was judged again when labels came, the newest verdict counts.
    """
    table = drift_reports.c
    query = (
        sql.select(table.window_start, table.window_end, table.alarm)
        .where(table.model_version == model_version, table.window_end <= until)
        .order_by(table.window_start, table.window_end, table.label_watermark, table.id)
    )
    with store.reading() as connection:
        newest = {(start, end): bool(alarm) for start, end, alarm in connection.execute(query)}
    return [(start, end, alarm) for (start, end), alarm in newest.items()]


def count_new_labels(
    store: Store, dataset_digest: str, until: int, require: Literal["single", "agreed"] = "single"
) -> int:
    """Predictions of the service's model, labelled by `until` (microseconds), that a data set version does not hold and
    a new one could: readers who disagree teach nothing.

    Args:
        require: agreed: a single reader is not enough either.
    """
    states: tuple[State, ...] = ("agreed", "adjudicated") + (("single",) if require == "single" else ())
    known = sql.union_all(*map(predictions_in_state, states))
    held = sql.select(dataset_predictions.c.prediction_id).where(dataset_predictions.c.dataset_digest == dataset_digest)
    query = (
        sql.select(sql.func.count(sql.distinct(labels.c.prediction_id)))
        .select_from(labels.join(predictions, predictions.c.id == labels.c.prediction_id))
        .where(predictions.c.role == "champion", labels.c.labelled_at <= until)
        .where(labels.c.prediction_id.not_in(held), labels.c.prediction_id.in_(known))
    )
    with store.reading() as connection:
        return connection.execute(query).scalar_one()


def last_retrainings(store: Store, until: int) -> tuple[int | None, int | None]:
    """When the last retraining that ended by `until` was done, and when the last one ended at all (microseconds)."""
    table = retrain_requests.c
    ended = sql.and_(table.state.in_((DONE, FAILED)), table.finished_at <= until)
    done = sql.func.max(sql.case((table.state == DONE, table.finished_at)))
    with store.reading() as connection:
        return tuple(connection.execute(sql.select(done, sql.func.max(table.finished_at)).where(ended)).one())


def candidate_since(store: Store, model_version: str) -> int | None:
    """When a model version came to the store, microseconds; None where the store was not told of it."""
    query = sql.select(candidates.c.created_at).where(candidates.c.model_version == model_version)
    with store.reading() as connection:
        return connection.execute(query).scalar()
