"""Raises alarms, once each, and says which of them repeat what was said already.

An alarm is always stored. One that says nothing new about its topic within the cool-down of an earlier one bears that
one's id in `quieted_by`, and is sent nowhere.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, RowMapping

from store.tables import alarms, now_us

INFO, WARNING, CRITICAL = SEVERITIES = ("info", "warning", "critical")
"""From the least to the most urgent."""

# Drift is looked for every day: a change that stays is told once a week.
COOL_DOWN_H = 7 * 24
HOUR_US = 3_600_000_000

_MAX_TOPIC = alarms.c.topic.type.length
# Any number that no other lock of the store uses: the class of the locks on topics.
_TOPIC_LOCKS = 0x616C6D74


def topic_name(*parts: str) -> str:
    """A topic, or a dedupe key: the parts joined by colons; where that is too long, the end of it is a digest."""
    name = ":".join(parts)
    if len(name) <= _MAX_TOPIC:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{name[: _MAX_TOPIC - 33]}:{digest}"


def insert_alarm(
    connection: Connection, row: Mapping[str, Any], cool_down_us: int = COOL_DOWN_H * HOUR_US
) -> dict[str, Any] | None:
    """Stores an alarm in the caller's write transaction; its row, or None where its `dedupe_key` is known.

    It is quieted where the topic has an alarm that is not, raised within the cool-down before it, unless its severity
    is higher than that of all these, or its findings (`detail["findings"]`, else `detail["drifted"]`) hold one that
    none of them names. Critical alarms, and those without a topic, are never quieted.

    Args:
        row: columns of `alarms`; `raised_at` (microseconds UTC) is now unless it is given.

    Raises:
        ValueError: an unknown severity.
    """
    if row["severity"] not in SEVERITIES:
        raise ValueError(f"severity is {row['severity']!r}; expected one of {', '.join(SEVERITIES)}")
    row = {"raised_at": now_us(), "topic": None, **row, "quieted_by": None}
    if row["topic"] is not None and row["severity"] != CRITICAL:
        _lock_topic(connection, row["topic"])
        row["quieted_by"] = _quieted_by(connection, row, cool_down_us)
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    # RETURNING, because with an id that the database gives, psycopg has no row count.
    statement = dialect.insert(alarms).values(**row).on_conflict_do_nothing().returning(alarms.c.id)
    new = connection.execute(statement).first()
    return None if new is None else {"id": new.id, **row}


def _lock_topic(connection: Connection, topic: str) -> None:
    """Until the transaction ends: of two alarms of a topic at a time, the second sees the first. SQLite's writers come
    one after the other anyhow."""
    if connection.dialect.name == "postgresql":
        # Two 32-bit keys, signed; topics that share one wait for each other, no more.
        key = zlib.crc32(topic.encode()) - 2**31
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_TOPIC_LOCKS, key)))


def _quieted_by(connection: Connection, row: Mapping[str, Any], cool_down_us: int) -> int | None:
    query = (
        sql.select(alarms.c.id, alarms.c.severity, alarms.c.detail)
        .where(alarms.c.topic == row["topic"], alarms.c.quieted_by.is_(None))
        .where(alarms.c.raised_at > row["raised_at"] - cool_down_us, alarms.c.dedupe_key != row["dedupe_key"])
        .order_by(alarms.c.raised_at.desc(), alarms.c.id.desc())
    )
    earlier = connection.execute(query).mappings().all()
    if not earlier or max(map(_rank, earlier)) < _rank(row):
        return None
    told = set().union(*map(_findings, earlier))
    return earlier[0]["id"] if _findings(row) <= told else None


def _rank(row: RowMapping | Mapping[str, Any]) -> int:
    return SEVERITIES.index(row["severity"])


def _findings(row: RowMapping | Mapping[str, Any]) -> set[str]:
    detail = row["detail"]
    return set(map(str, detail.get("findings", detail.get("drifted", ()))))
