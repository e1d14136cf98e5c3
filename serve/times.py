"""Stored times as dates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(microseconds: int) -> datetime:
    """A stored time, microseconds since the epoch, as an aware date in UTC."""
    return EPOCH + timedelta(microseconds=microseconds)


def utc(microseconds: int | None) -> datetime | None:
    """As `moment`; None stays None."""
    return None if microseconds is None else moment(microseconds)
