"""What the experts' labels of a prediction come to: one truth per prediction, or a disagreement.

- Each labeller's latest label counts, latest in the order in which the store took them; those before it are superseded.
- An adjudication settles: its class is the truth (`adjudicated`), the newest of them where there are several.
- Without one, a single reader's label is the truth (`single`), and so is the class that all of several readers give
  (`agreed`). Readers who give different classes disagree (`disagreed`): no class is the truth; whether it is malignant
  is known where all of them say the same of that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sql

from store.database import Store
from store.tables import labels, predictions

State = Literal["single", "agreed", "disagreed", "adjudicated"]

# Well below SQLite's limit on the values of one statement.
_CHUNK = 500
_COLUMNS = [
    labels.c[name] for name in ("id", "prediction_id", "label", "malignant", "labeller", "labelled_at", "adjudication")
]


@dataclass(frozen=True)
class Truth:
    """What a prediction's labels come to.

    Attributes:
        label: the class; None where readers disagree.
        malignant: None where readers disagree on that too.
        readers: labellers whose label counts, without those who adjudicate.
        first_labelled_at: earliest time of any label, superseded ones too; microseconds UTC, as `labelled_at`.
        labelled_at: latest time among `label_ids`.
        label_ids: the labels that it rests on, ascending: the adjudication alone, or each reader's latest.
    """

    prediction_id: str
    label: str | None
    malignant: bool | None
    state: State
    readers: int
    first_labelled_at: int
    labelled_at: int
    label_ids: tuple[int, ...]


def consensus(rows: Iterable[Mapping[str, Any]]) -> list[Truth]:
    """One truth per prediction, by prediction id.

    Args:
        rows: all labels of each prediction, in any order: mappings with `id, prediction_id, label, malignant, labeller,
            labelled_at, adjudication`.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["prediction_id"]].append(row)
    return [_truth(prediction_id, given) for prediction_id, given in sorted(grouped.items())]


def _truth(prediction_id: str, given: Sequence[Mapping[str, Any]]) -> Truth:
    in_order = sorted(given, key=lambda row: row["id"])
    current = sorted({row["labeller"]: row for row in in_order}.values(), key=lambda row: row["id"])
    readers = [row for row in current if not row["adjudication"]]
    settling = [row for row in current if row["adjudication"]]
    counted = settling[-1:] or readers
    classes, malignancies = {row["label"] for row in counted}, {row["malignant"] for row in counted}
    state: State
    if settling:
        state = "adjudicated"
    elif len(readers) == 1:
        state = "single"
    else:
        state = "agreed" if len(classes) == 1 else "disagreed"
    return Truth(
        prediction_id=prediction_id,
        label=classes.pop() if len(classes) == 1 else None,
        malignant=malignancies.pop() if len(malignancies) == 1 else None,
        state=state,
        readers=len(readers),
        first_labelled_at=min(row["labelled_at"] for row in given),
        labelled_at=max(row["labelled_at"] for row in counted),
        label_ids=tuple(row["id"] for row in counted),
    )


def predictions_in_state(state: State) -> sql.Select:
    """SELECT of the ids of all predictions whose labels come to this, as `consensus` says it."""
    later = labels.alias("later")
    # Not by `supersedes`, which has no index.
    superseded = sql.exists().where(
        later.c.prediction_id == labels.c.prediction_id,
        later.c.labeller == labels.c.labeller,
        later.c.id > labels.c.id,
    )
    settled = sql.func.max(sql.case((labels.c.adjudication, 1), else_=0)) == 1
    readers, classes = sql.func.count(), sql.func.count(labels.c.label.distinct())
    having = {
        "adjudicated": settled,
        "single": sql.and_(~settled, readers == 1),
        "agreed": sql.and_(~settled, readers > 1, classes == 1),
        "disagreed": sql.and_(~settled, classes > 1),
    }[state]
    query = sql.select(labels.c.prediction_id).where(~superseded).group_by(labels.c.prediction_id).having(having)
    if state in ("agreed", "disagreed"):
        # Few have several labels, and the index on predictions finds them.
        several = labels.alias("several")
        counted = sql.select(several.c.prediction_id).group_by(several.c.prediction_id).having(sql.func.count() > 1)
        query = query.where(labels.c.prediction_id.in_(counted))
    return query


def truths_between(store: Store, start_us: int, end_us: int, model_version: str | None = None) -> list[Truth]:
    """Truths of the champion's predictions received in [start_us, end_us), by prediction id; of one model's if named.

    Unlabelled predictions have none.
    """
    query = (
        sql.select(*_COLUMNS)
        .select_from(labels.join(predictions, labels.c.prediction_id == predictions.c.id))
        .where(predictions.c.role == "champion")
        .where(predictions.c.received_at >= start_us, predictions.c.received_at < end_us)
    )
    if model_version is not None:
        query = query.where(predictions.c.model_version == model_version)
    with store.reading() as connection:
        return consensus(connection.execute(query).mappings())


def truths_of(store: Store, prediction_ids: Iterable[str]) -> dict[str, Truth]:
    """Truths of these predictions, by prediction id; unlabelled and unknown ones are left out."""
    found: list[Truth] = []
    with store.reading() as connection:
        for chunk in _chunks(sorted(set(prediction_ids))):
            query = sql.select(*_COLUMNS).where(labels.c.prediction_id.in_(chunk))
            found += consensus(connection.execute(query).mappings())
    return {truth.prediction_id: truth for truth in found}


def truths_labelled_after(store: Store, after_label_id: int, limit: int) -> tuple[list[Truth], int]:
    """Truths of the predictions that the first `limit` labels behind `after_label_id` are of, by prediction id, and the
    id to go on after; `after_label_id` itself where nothing is new."""
    query = sql.select(labels.c.id, labels.c.prediction_id).where(labels.c.id > after_label_id)
    with store.reading() as connection:
        new = connection.execute(query.order_by(labels.c.id).limit(limit)).all()
    truths = truths_of(store, (prediction_id for _, prediction_id in new))
    return [truths[key] for key in sorted(truths)], new[-1][0] if new else after_label_id


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]
