"""How a lesion stands out among the lesions of its group: z-scores and percentile ranks within groups, vectorised.

A row's result depends on rows of its own group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_missing(value: Any) -> bool:
    """None, NaN, an empty string or a table library's own missing mark."""
    if isinstance(value, str):
        return value == ""
    # The type is asked first: comparing pandas' NA with itself raises.
    return value is None or type(value).__name__ in ("NAType", "NaTType") or bool(value != value)


def group_codes(groups: Sequence) -> np.ndarray:
    """int (N,): one code per group id. A row without an id (None, NaN, empty) is a group of its own."""
    values = list(groups)
    codes: dict[Any, int] = {}
    return np.array(
        [codes.setdefault(("row", i) if is_missing(value) else value, len(codes)) for i, value in enumerate(values)],
        dtype=np.int64,
    )


def z_scores(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Standardises each column within each group.

    Args:
        values: float (N, F), NaN = missing.
        codes: group code int (N,).

    Returns:
        float64 (N, F): (x - mean) / standard deviation over the group's known values; 0 where they are all equal (so
        also for a lesion on its own); NaN where x is missing.
    """
    if len(values) == 0:
        return values.astype(np.float64)
    order = np.argsort(codes, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(codes[order], prepend=codes[order][0] - 1))
    sizes = np.diff(np.append(starts, len(codes)))
    known = ~np.isnan(ordered)
    counts = np.maximum(np.add.reduceat(known.astype(np.int64), starts, axis=0), 1)
    means = np.add.reduceat(np.where(known, ordered, 0.0), starts, axis=0) / counts
    deviation = ordered - np.repeat(means, sizes, axis=0)
    spread = np.sqrt(np.add.reduceat(np.where(known, deviation, 0.0) ** 2, starts, axis=0) / counts)
    # Equal values leave a spread of rounding noise, which would blow up to a z-score of ±1.
    spread = np.repeat(np.where(spread > 1e-9 * np.abs(means), spread, np.inf), sizes, axis=0)
    result = np.empty(values.shape, dtype=np.float64)
    result[order] = deviation / spread
    return result


def percentile_ranks(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Ranks each column within each group.

    Args:
        values: float (N, F), NaN = missing.
        codes: group code int (N,).

    Returns:
        float64 (N, F) in (0, 1): (rank - 0.5) / known values of the group, ties share their mean rank, so a lesion on
        its own has 0.5; NaN where x is missing.
    """
    result = np.full(values.shape, np.nan)
    for column in range(values.shape[1]):
        rows = np.flatnonzero(~np.isnan(values[:, column]))
        if len(rows) == 0:
            continue
        order = rows[np.lexsort((values[rows, column], codes[rows]))]
        group, value, position = codes[order], values[order, column], np.arange(len(order))
        new_group = np.diff(group, prepend=group[0] - 1) != 0
        new_value = new_group | (np.diff(value, prepend=value[0]) != 0)
        group_start, group_size = position[new_group], np.diff(np.append(position[new_group], len(order)))
        tie_start, tie_size = position[new_value], np.diff(np.append(position[new_value], len(order)))
        mean_position = np.repeat(tie_start + (tie_size - 1) / 2, tie_size)
        result[order, column] = (mean_position - np.repeat(group_start, group_size) + 0.5) / np.repeat(
            group_size, group_size
        )
    return result
