"""Which predictions an expert should label next: those nearest to the threshold, and a random sample of all."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.erased_patients import keep_erasures_out
from store.prediction_records import PredictionFilter
from store.tables import images, predictions

HANDED_OUT = "hand_out_label_tasks"

_PAGE_ROWS = 5_000
# Below the fewest parameters that either database takes in one statement.
_CHUNK = 500
_LEAST_ODDS = 1e-12
_SHOWN = ("id", "received_at", "model_version", "image_hash", "metadata", "class_probabilities")
_SCORES = ("risk", "threshold", "abstained")


class LabelTask(NamedTuple):
    """A prediction to be labelled.

    Attributes:
        row: id, received_at, model_version, metadata, class_probabilities, risk, threshold, abstained, image_hash and
            the picture's `suffix`.
        selected_by: `uncertain` ones lie nearest to the threshold; `random` ones alone say how often the model errs.
    """

    row: dict[str, Any]
    selected_by: Literal["uncertain", "random"]


def select_label_tasks(
    store: Store, wanted: PredictionFilter, num_tasks: int, uncertain_share: float, seed: int
) -> tuple[list[LabelTask], int]:
    """At most `num_tasks` predictions that pass the filter and whose picture is kept, by id; and how many there were to
    choose from.

    Uncertainty is the distance of risk and threshold in log odds: thresholds lie near zero, where a difference of risks
    would call every low risk uncertain. The random sample are the lowest hashes of (seed, id): the same while the log
    grows, but for what the growth adds. What is too few of one kind is made up from the other.

    Args:
        uncertain_share: of `num_tasks`, 0 to 1; the rest is random.
    """
    num_uncertain = round(num_tasks * uncertain_share)
    # Heaps of the least keys so far; as negative numbers, so that the largest of them is on top and leaves first.
    nearest: list[tuple[float, str]] = []
    drawn: list[tuple[int, str]] = []
    total = 0
    for prediction_id, risk, threshold in _pages(store, wanted):
        total += 1
        _keep_least(drawn, -_draw(seed, prediction_id), prediction_id, num_tasks)
        if risk is not None and threshold is not None:
            _keep_least(nearest, -abs(_log_odds(risk) - _log_odds(threshold)), prediction_id, num_tasks)
    in_order = [prediction_id for _, prediction_id in sorted(nearest, key=lambda item: (-item[0], item[1]))]
    chosen: dict[str, Literal["uncertain", "random"]] = dict.fromkeys(in_order[:num_uncertain], "uncertain")
    for _, prediction_id in sorted(drawn, reverse=True):
        if len(chosen) < num_tasks:
            chosen.setdefault(prediction_id, "random")
    rows = _rows(store, sorted(chosen))
    return [LabelTask(row, chosen[row["id"]]) for row in rows], total


def record_handout(store: Store, name: str, ids: Collection[str], actor: str, detail: dict[str, Any]) -> frozenset[str]:
    """Notes in the audit trail that tasks and their pictures leave the service, unless some of them are gone.

    An erasure either came before, and its records are found gone here, or comes after the entry.

    Args:
        name: of the tasks.
        detail: what the entry says of them; no patient content.

    Returns:
        Ids whose record or picture is no longer kept, erased since they were chosen: with any, nothing was noted.
    """
    with store.writing() as connection:
        keep_erasures_out(connection)
        gone = frozenset(ids) - {row["id"] for row in _rows_in(connection, sorted(ids))}
        if not gone:
            store._append_audit(connection, actor, HANDED_OUT, f"label_tasks/{name}", detail)
    return gone


def _keep_least(heap: list, negative: float, prediction_id: str, size: int) -> None:
    if len(heap) < size:
        heapq.heappush(heap, (negative, prediction_id))
    elif heap:
        heapq.heappushpop(heap, (negative, prediction_id))


def _draw(seed: int, prediction_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{prediction_id}".encode()).digest()[:8], "big")


def _log_odds(probability: float) -> float:
    return math.log(max(probability, _LEAST_ODDS) / max(1.0 - probability, _LEAST_ODDS))


def _pages(store: Store, wanted: PredictionFilter) -> Iterator[tuple[str, float | None, float | None]]:
    table = predictions.c
    after: tuple[int, str] | None = None
    while True:
        query = (
            sql.select(table.id, table.risk, table.threshold, table.received_at)
            .join(images, images.c.hash == table.image_hash)
            .where(*wanted.conditions())
        )
        if after is not None:
            later = sql.or_(table.received_at > after[0], table.id > after[1])
            query = query.where(table.received_at >= after[0], later)
        query = query.order_by(table.received_at, table.id).limit(_PAGE_ROWS)
        with store.reading() as connection:
            page = connection.execute(query).all()
        yield from ((row.id, row.risk, row.threshold) for row in page)
        if len(page) < _PAGE_ROWS:
            return
        after = (page[-1].received_at, page[-1].id)


def _rows(store: Store, ids: list[str]) -> list[dict[str, Any]]:
    with store.reading() as connection:
        return _rows_in(connection, ids)


def _rows_in(connection: Connection, ids: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    columns = [predictions.c[name] for name in (*_SHOWN, *_SCORES)]
    for start in range(0, len(ids), _CHUNK):
        query = (
            sql.select(*columns, images.c.suffix)
            .join(images, images.c.hash == predictions.c.image_hash)
            .where(predictions.c.id.in_(ids[start : start + _CHUNK]))
            .order_by(predictions.c.id)
        )
        found += [dict(row) for row in connection.execute(query).mappings()]
    return found
