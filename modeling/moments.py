"""Times in job configs: a date or a time from YAML or a flag, as the store keeps it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from pydantic import PlainValidator


def _microseconds(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            pass
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError("expected a date such as 2026-11-21 or a time such as 2026-11-21T08:00:00Z")
    value = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return (value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


MomentUs = Annotated[int | None, PlainValidator(_microseconds)]
"""Microseconds since the epoch, UTC; a date is its first moment."""
