"""Risks of the champion's answers: the newest ones of a window, and those of which experts have said what they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.label_consensus import consensus
from store.tables import labels, predictions

# Enough for a share to within one or two percent; read in 12 ms.
SAMPLED_RISKS = 5_000
# The newest; read in 40 ms, most of which goes into what readers agree on.
MAX_LABELS = 2_000
_ANSWER = (
    *("id", "role", "received_at", "model_version", "patient_hmac"),
    *("context", "risk", "threshold", "abstained"),
)
# Well below SQLite's limit on the values of one statement.
_CHUNK = 500


@dataclass(frozen=True)
class Risk:
    """One scored answer.

    Attributes:
        risk, threshold: 0-1.
    """

    context: str
    risk: float
    threshold: float


@dataclass(frozen=True)
class LabelledRisk(Risk):
    """One scored answer of which it is known what it was; `group`: the patient, or the record where none was named."""

    malignant: bool
    group: str


def recent_risks(
    store: Store, model_version: str, start_us: int, end_us: int, limit: int = SAMPLED_RISKS
) -> list[Risk]:
    """The newest `limit` scored answers of a model received in [start_us, end_us), newest first."""
    table = predictions.c
    query = (
        sql.select(table.context, table.risk, table.threshold)
        .where(table.role == "champion", table.received_at >= start_us, table.received_at < end_us)
        .where(table.model_version == model_version, sql.not_(table.abstained))
        .where(table.risk.is_not(None), table.threshold.is_not(None))
        .order_by(table.received_at.desc())
        .limit(limit)
    )
    with store.reading() as connection:
        return [Risk(*row) for row in connection.execute(query)]


def labelled_risks(
    store: Store, model_version: str, start_us: int, end_us: int, limit: int = MAX_LABELS
) -> tuple[list[LabelledRisk], bool]:
    """Scored answers of a model received in [start_us, end_us) whose readers agree on whether they are malignant, and
    whether there are more labels than the newest `limit` that were looked at.

    A label that is dated before `start_us` is not looked at: it is of an earlier answer, or of a clock that is wrong.
    """
    names = ("id", "prediction_id", "label", "malignant", "labeller", "labelled_at", "adjudication")
    # By the labels: an index of the answers would lead through all of them.
    query = sql.select(*(labels.c[name] for name in names)).where(labels.c.labelled_at >= start_us)
    with store.reading() as connection:
        given = connection.execute(query.order_by(labels.c.labelled_at.desc()).limit(limit + 1)).mappings().all()
        known = {truth.prediction_id: truth.malignant for truth in consensus(given) if truth.malignant is not None}
        found = _read(connection, sorted(known))
    rows = [
        LabelledRisk(row.context, row.risk, row.threshold, known[row.id], row.patient_hmac or row.id)
        for row in found
        if row.role == "champion" and row.model_version == model_version and start_us <= row.received_at < end_us
        # What lacks one of these, whatever it calls itself, has no place among risks.
        if not row.abstained and row.risk is not None and row.threshold is not None
    ]
    return rows, len(given) > limit


def _read(connection: Connection, ids: Sequence[str]) -> list[sql.Row[Any]]:
    # By their ids alone: with more conditions SQLite takes the index of times, and a second instead of 30 ms.
    query = sql.select(*(predictions.c[name] for name in _ANSWER))
    found: list[sql.Row[Any]] = []
    for start in range(0, len(ids), _CHUNK):
        found += connection.execute(query.where(predictions.c.id.in_(ids[start : start + _CHUNK])))
    return found
