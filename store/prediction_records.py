"""Reads the prediction log for people: filtered pages, one record with its labels, the picture it was made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.label_consensus import State, predictions_in_state
from store.tables import images, labels, predictions

_COLUMNS = [column for column in predictions.c if column.name not in ("embedding", "idempotency_key")]
# Below the fewest parameters that either database takes in one statement.
_CHUNK = 500
_EQUAL = ("model_version", "band", "abstained", "context", "institution", "device", "patient_hmac")


@dataclass(frozen=True)
class PredictionFilter:
    """Which records a page holds; None leaves a field open.

    `from_us` (inclusive) and `to_us` (exclusive) bound `received_at`, microseconds UTC; `min_risk` and `max_risk` are
    inclusive and leave out abstained records, which have no risk. `labelled`: with (True) or without (False) a label;
    `label_state`: what the labels come to, see `label_consensus`.
    """

    role: str = "champion"
    from_us: int | None = None
    to_us: int | None = None
    model_version: str | None = None
    band: str | None = None
    abstained: bool | None = None
    context: str | None = None
    institution: str | None = None
    device: str | None = None
    patient_hmac: str | None = None
    labelled: bool | None = None
    label_state: State | None = None
    min_risk: float | None = None
    max_risk: float | None = None

    def conditions(self) -> list[sql.ColumnElement[bool]]:
        """The WHERE clause's parts."""
        table = predictions.c
        found = [table[name] == value for name in _EQUAL if (value := getattr(self, name)) is not None]
        # A patient has few records, and few records are labelled. SQLite, which knows no numbers, would rather walk the
        # index on role and time; as an expression, the role leaves it the one on patients, or on ids.
        few = self.patient_hmac is not None or self.label_state is not None
        found.append((sql.func.coalesce(table.role, "") if few else table.role) == self.role)
        if self.from_us is not None:
            found.append(table.received_at >= self.from_us)
        if self.to_us is not None:
            found.append(table.received_at < self.to_us)
        if self.min_risk is not None:
            found.append(table.risk >= self.min_risk)
        if self.max_risk is not None:
            found.append(table.risk <= self.max_risk)
        if self.labelled is not None:
            found.append(_labelled() if self.labelled else ~_labelled())
        if self.label_state is not None:
            found.append(table.id.in_(predictions_in_state(self.label_state)))
        return found


def _labelled() -> sql.Exists:
    return sql.exists().where(labels.c.prediction_id == predictions.c.id)


def predictions_page(
    store: Store, wanted: PredictionFilter, after: tuple[int, str] | None, limit: int
) -> Sequence[dict[str, Any]]:
    """At most `limit` records, newest first, without embeddings; each has `labelled`, a bool.

    Args:
        after: (received_at, id) of the last record of the page before; records that arrive meanwhile neither move nor
            repeat those behind it.
    """
    table = predictions.c
    query = sql.select(*_COLUMNS, _labelled().label("labelled")).where(*wanted.conditions())
    if after is not None:
        # The first condition is what the index on (role, received_at) is searched with.
        query = query.where(table.received_at <= after[0], sql.or_(table.received_at < after[0], table.id < after[1]))
    query = query.order_by(table.received_at.desc(), table.id.desc()).limit(limit)
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def prediction_with_labels(store: Store, prediction_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """One record without its embedding, and its labels, oldest first; None for an unknown id."""
    query = sql.select(*_COLUMNS).where(predictions.c.id == prediction_id)
    given = sql.select(labels).where(labels.c.prediction_id == prediction_id).order_by(labels.c.id)
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
        if row is None:
            return None
        return dict(row), [dict(label) for label in connection.execute(given).mappings()]


def predictions_by_id(store: Store, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Records by id, without embeddings; unknown ids are left out."""
    found: dict[str, dict[str, Any]] = {}
    with store.reading() as connection:
        for start in range(0, len(ids), _CHUNK):
            query = sql.select(*_COLUMNS).where(predictions.c.id.in_(ids[start : start + _CHUNK]))
            found |= {row["id"]: dict(row) for row in connection.execute(query).mappings()}
    return found


def known_predictions(store: Store, ids: Collection[str]) -> set[str]:
    """Those of the ids that the log has."""
    wanted, found = sorted(ids), set()
    with store.reading() as connection:
        for start in range(0, len(wanted), _CHUNK):
            query = sql.select(predictions.c.id).where(predictions.c.id.in_(wanted[start : start + _CHUNK]))
            found.update(connection.execute(query).scalars())
    return found


def prediction_image(store: Store, prediction_id: str) -> tuple[str | None, str | None] | None:
    """Hash and suffix of a record's picture; the suffix is None where the picture is no longer kept.

    None for an unknown id.
    """
    query = (
        sql.select(predictions.c.image_hash, images.c.suffix)
        .select_from(predictions.outerjoin(images, predictions.c.image_hash == images.c.hash))
        .where(predictions.c.id == prediction_id)
    )
    with store.reading() as connection:
        row = connection.execute(query).first()
        return None if row is None else (row[0], row[1])
