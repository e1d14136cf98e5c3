"""Stores the labels of a file, one by one: what a store that goes away has taken is known when the file comes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from store.database import Store
from store.label_files import LabelProblem, PlacedLabel
from store.labels import ReaderAdjudicatesError, add_label
from store.shadow_records import is_shadow_id


def store_labels(
    store: Store, labels: Iterable[PlacedLabel], actor: str, alarmed: Callable[[dict[str, Any]], None]
) -> tuple[Counter[str], list[LabelProblem]]:
    """Adds the labels, each in its own transaction; counts `added, known, outdated, alarms`, and `corrected`, the added
    ones that supersede another; and the refused ones: `unknown_prediction`, `reader_adjudicates`.

    Args:
        actor: who imports, for the audit trail.
        alarmed: told of each alarm that a label raises.
    """
    counts: Counter[str] = Counter(added=0, known=0, outdated=0, corrected=0, alarms=0)
    problems = []
    for place, label, task in labels:
        try:
            # Nobody was answered by a shadow's record.
            added = None if is_shadow_id(label.prediction_id) else add_label(store, label, actor)
        except ReaderAdjudicatesError as error:
            problems.append(LabelProblem(place, label.prediction_id, "reader_adjudicates", str(error), task))
            continue
        if added is None:
            problems.append(unknown_prediction(PlacedLabel(place, label, task)))
            continue
        counts["outdated" if added.outdated else "added" if added.is_new else "known"] += 1
        if added.is_new and added.row["supersedes"] is not None:
            counts["corrected"] += 1
        if added.alarm is not None:
            counts["alarms"] += 1
            alarmed(added.alarm)
    return counts, problems


def unknown_prediction(placed: PlacedLabel) -> LabelProblem:
    """The problem of a label whose prediction is not in the log."""
    detail = "no such prediction in the log: never made, or erased"
    return LabelProblem(placed.place, placed.label.prediction_id, "unknown_prediction", detail, placed.task)
