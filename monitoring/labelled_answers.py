"""What experts said of a model's answers, beside what the model said: the rows that its quality is measured on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sql

from store.database import Store
from store.label_consensus import Truth, truths_between
from store.tables import predictions

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 500
_COLUMNS = (
    *("id", "received_at", "patient_hmac", "institution", "device", "context", "metadata"),
    *("risk", "threshold", "band", "abstained"),
)
_SCORED = ("risk", "threshold", "band")

Stratum = tuple[str, str]


@dataclass(frozen=True)
class LabelledAnswers:
    """Answers of one model in one window.

    Attributes:
        rows: one per answer of which it is known whether the lesion is malignant, by id: `risk`, `threshold` (None of
            an abstention), `band`, `abstained`, `context`, `institution`, `device`, `group` (patient), `malignant`,
            `delay_us` (from the answer to the first label), `meta.<column>`.
        answers: number of scored answers by (context, band), labelled or not.
        abstentions: number of answers without a risk.
        truths: what the readers of each labelled answer agree on, also where they do not.
    """

    rows: pd.DataFrame
    answers: dict[Stratum, int]
    abstentions: int
    truths: list[Truth]

    @property
    def states(self) -> dict[str, int]:
        """Labelled answers by what their readers came to, see `Truth`."""
        return dict(sorted(Counter(truth.state for truth in self.truths).items()))


def read_labelled_answers(
    store: Store, start_us: int, end_us: int, model_version: str | None = None
) -> LabelledAnswers:
    """Champion's answers received in [start_us, end_us), of one model version or of all, with their labels.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    truths = truths_between(store, start_us, end_us, model_version)
    known = {truth.prediction_id: truth for truth in truths if truth.malignant is not None}
    answers, abstentions = _count_answers(store, start_us, end_us, model_version)
    return LabelledAnswers(_table(_read(store, sorted(known)), known), answers, abstentions, truths)


def _count_answers(
    store: Store, start_us: int, end_us: int, model_version: str | None
) -> tuple[dict[Stratum, int], int]:
    table = predictions.c
    # An answer that lacks one of these, whatever it calls itself, has nothing to be judged by.
    unscored = sql.or_(table.abstained, *(table[name].is_(None) for name in _SCORED))
    keys = (table.context, table.band, sql.case((unscored, 1), else_=0))
    query = (
        sql.select(*keys, sql.func.count())
        .where(table.role == "champion", table.received_at >= start_us, table.received_at < end_us)
        .group_by(*keys)
    )
    if model_version is not None:
        query = query.where(table.model_version == model_version)
    answers: Counter[Stratum] = Counter()
    abstentions = 0
    with store.reading() as connection:
        for context, band, without, count in connection.execute(query):
            if without:
                abstentions += count
            else:
                answers[context, band] += count
    return dict(answers), abstentions


def _read(store: Store, ids: list[str]) -> list[dict[str, Any]]:
    columns = [predictions.c[name] for name in _COLUMNS]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(ids), _CHUNK):
        query = sql.select(*columns).where(predictions.c.id.in_(ids[start : start + _CHUNK])).order_by(predictions.c.id)
        with store.reading() as connection:
            rows += map(dict, connection.execute(query).mappings())
    return rows


def _table(rows: list[dict[str, Any]], known: dict[str, Truth]) -> pd.DataFrame:
    import pandas as pd

    plain = [name for name in _COLUMNS if name not in ("metadata", "patient_hmac")]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in plain}
    columns["abstained"] = [bool(row["abstained"]) or any(row[name] is None for name in _SCORED) for row in rows]
    columns["group"] = [row["patient_hmac"] or row["id"] for row in rows]
    columns["malignant"] = [bool(known[row["id"]].malignant) for row in rows]
    # A label that is dated before its answer is a clock's fault, or of a biopsy before: no delay.
    columns["delay_us"] = [max(0, known[row["id"]].first_labelled_at - row["received_at"]) for row in rows]
    for name in sorted({name for row in rows for name in row["metadata"]}):
        columns[f"meta.{name}"] = [row["metadata"].get(name) for row in rows]
    return pd.DataFrame(columns)
