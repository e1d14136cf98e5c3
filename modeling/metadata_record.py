"""Checks the metadata of one lesion as a caller sends it, before it reaches the features or the log."""

from __future__ import annotations

import math
from typing import Any

from modeling.schema import ColumnSpec, TaskSpec

# An unseen category is allowed and logged, so its length must have an end.
MAX_CATEGORY_LENGTH = 200


def _shown(value: Any) -> str:
    """The value for a one-line message, shortened."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of over 30 digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _number(field: str, value: Any, spec: ColumnSpec) -> float:
    low, high = spec.minimum, spec.maximum
    expected = "a finite number"
    if low is not None and high is not None:
        expected = f"a number from {low:g} to {high:g}"
    elif low is not None:
        expected = f"a number of at least {low:g}"
    elif high is not None:
        expected = f"a number of at most {high:g}"
    problem = f"metadata field {field!r} is {_shown(value)}; expected {expected} or null"
    # bool is an int in Python; numeric strings would hide a caller that mixes up its fields.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(problem)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(problem) from None
    if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(problem)
    return number


def _category(field: str, value: Any, spec: ColumnSpec) -> str:
    if spec.categories is not None:
        if isinstance(value, str) and value in spec.categories:
            return value
        raise ValueError(f"metadata field {field!r} is {_shown(value)}; expected one of {spec.categories} or null")
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_CATEGORY_LENGTH:
        raise ValueError(
            f"metadata field {field!r} is {_shown(value)}; "
            f"expected text of 1 to {MAX_CATEGORY_LENGTH} characters or null"
        )
    return value


def clean_record(task: TaskSpec, metadata: dict[str, Any]) -> dict[str, float | str | None]:
    """One lesion's metadata with every column of the task, in the task's order.

    Args:
        task: its `columns` say which fields exist, of which kind and range.
        metadata: a decoded JSON object. Absent and null fields are missing; an unseen category passes unless the
            column lists its categories.

    Returns:
        column -> float, str or None (missing).

    Raises:
        ValueError: in one line with field, value and what was expected, for an unknown field, a wrong type (numeric
            strings and booleans included), NaN, infinity, or a value out of range.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata is {_shown(metadata)}; expected a JSON object of field: value")
    unknown = [field for field in metadata if field not in task.columns]
    if unknown:
        field = unknown[0]
        raise ValueError(
            f"metadata field {_shown(field)} is unknown (value {_shown(metadata[field])}); "
            f"expected fields: {', '.join(task.columns) or 'none, the model reads no metadata'}"
        )
    cleaned: dict[str, float | str | None] = {}
    for field, spec in task.columns.items():
        value = metadata.get(field)
        if value is None:
            cleaned[field] = None
        else:
            cleaned[field] = (_number if spec.kind == "numeric" else _category)(field, value, spec)
    return cleaned
