"""What becomes of alarms at each channel: the table of alarms is the outbox, `alarm_deliveries` says how far it is.

A channel has one message under way at a time: all its pending rows, whose alarms were taken together. Alarms that come
meanwhile wait for the next message, however long a receiver is away. So the same alarms make the same message at each
attempt, whichever process sends it, and its id follows from them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.alarm_topics import SEVERITIES
from store.database import Store
from store.tables import alarm_deliveries, alarms, now_us

PENDING, SENT, FAILED, SKIPPED = "pending", "sent", "failed", "skipped"

# Of one message; more wait for the next. Both databases take as many parameters.
MAX_ALARMS = 5_000
# Any number that no other lock of the store uses: the class of the locks on channels.
_CHANNEL_LOCKS = 0x616C6368

_deliveries = alarm_deliveries.c


@dataclass(frozen=True)
class Subscription:
    """Which alarms a channel takes: those of `kinds` (None: all) from `min_severity` on that are not quieted."""

    channel: str
    kinds: tuple[str, ...] | None = None
    min_severity: str = SEVERITIES[0]

    @property
    def condition(self) -> sql.ColumnElement[bool]:
        severities = SEVERITIES[SEVERITIES.index(self.min_severity) :]
        taken = sql.and_(alarms.c.quieted_by.is_(None), alarms.c.severity.in_(severities))
        return taken if self.kinds is None else sql.and_(taken, alarms.c.kind.in_(self.kinds))


@dataclass(frozen=True)
class Delivery:
    """A message that is this process's to send until `leased_until` (microseconds UTC).

    Attributes:
        alarms: rows of `alarms`, oldest first.
        attempts: counts this one.
    """

    channel: str
    alarms: tuple[dict[str, Any], ...]
    attempts: int
    leased_until: int

    @property
    def message_id(self) -> str:
        """The same for these alarms at this channel, whoever sends them and however often."""
        content = f"{self.channel}:{','.join(str(row['id']) for row in self.alarms)}"
        return f"msg_{hashlib.sha256(content.encode()).hexdigest()[:32]}"

    @property
    def newest_us(self) -> int:
        return max(row["raised_at"] for row in self.alarms)


def claim_delivery(
    store: Store,
    subscription: Subscription,
    lease_us: int,
    max_attempts: int,
    max_age_us: int,
    gap_us: int = 0,
    now: int | None = None,
) -> Delivery | None:
    """Takes the channel's next message, if one is due, for `lease_us`; no other process gets it meanwhile.

    Alarms older than `max_age_us` that no message took yet are never sent: they are skipped where the channel has
    taken none before, and failed where they waited for a receiver too long.

    Args:
        max_attempts: one whose sender died in its last attempt is failed instead.
        gap_us: a new message begins at the earliest so long after the last one was sent.
        now: microseconds since the epoch; None: the present.
    """
    now = now_us() if now is None else now
    if not is_due(store, subscription, gap_us, now):
        return None
    with store.writing() as connection:
        if connection.dialect.name == "postgresql":
            key = zlib.crc32(subscription.channel.encode()) - 2**31
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_CHANNEL_LOCKS, key)))
        rows = _under_way(connection, subscription.channel)
        if rows and rows[0]["attempts"] >= max_attempts and _free(rows[0], now):
            error = rows[0]["last_error"] or "the sender ended in its last attempt"
            _update(connection, subscription.channel, rows, state=FAILED, leased_until=None, last_error=error)
            rows = []
        if not rows:
            _pass_over_old(connection, subscription, now - max_age_us, now)
            rows = _take_new(connection, subscription, gap_us, now)
        if not rows or not _free(rows[0], now):
            return None
        attempts, leased_until = rows[0]["attempts"] + 1, now + lease_us
        _update(connection, subscription.channel, rows, attempts=attempts, leased_until=leased_until)
    content = tuple({name: row[name] for name in alarms.c.keys()} for row in rows)
    return Delivery(subscription.channel, content, attempts, leased_until)


def is_due(store: Store, subscription: Subscription, gap_us: int = 0, now: int | None = None) -> bool:
    """Whether `claim_delivery` may have something; nothing is locked for it, so that idle senders do not queue up for
    SQLite's one write lock."""
    now = now_us() if now is None else now
    with store.reading() as connection:
        first = _under_way(connection, subscription.channel, 1)
        if first:
            return _free(first[0], now)
        new = sql.select(alarms.c.id).where(_untouched(subscription)).limit(1)
        return connection.execute(new).first() is not None and not _in_gap(connection, subscription, gap_us, now)


def next_attempt(store: Store, channel: str) -> int | None:
    """When the channel's message under way is due (microseconds UTC); None where there is none."""
    with store.reading() as connection:
        # By its alarms, as `claim_delivery` reads it: a retention may have removed some meanwhile.
        rows = _under_way(connection, channel, 1)
    return max(rows[0]["next_attempt_at"], rows[0]["leased_until"] or 0) if rows else None


def mark_sent(store: Store, delivery: Delivery, now: int | None = None) -> bool:
    """The receiver has the message, also where the lease went to another meanwhile; False: another said so first."""
    now = now_us() if now is None else now
    values = {"state": SENT, "sent_at": now, "leased_until": None, "last_error": None}
    return _settle(store, delivery, False, values)


def back_off(store: Store, delivery: Delivery, not_before: int, error: str) -> bool:
    """An attempt failed; the next is due at `not_before` (microseconds UTC). False: the lease went to another."""
    return _settle(store, delivery, True, {"next_attempt_at": not_before, "leased_until": None, "last_error": error})


def give_up(store: Store, delivery: Delivery, error: str) -> bool:
    """The message failed for good; False as `back_off`."""
    return _settle(store, delivery, True, {"state": FAILED, "leased_until": None, "last_error": error})


def count_deliveries(store: Store, open_only: bool = False) -> dict[tuple[str, str], int]:
    """Alarms by (channel, state), of `PENDING` and `FAILED`.

    Args:
        open_only: without those that someone has acknowledged.
    """
    query = (
        sql.select(_deliveries.channel, _deliveries.state, sql.func.count())
        .join(alarms, alarms.c.id == _deliveries.alarm_id)
        .where(_deliveries.state.in_((PENDING, FAILED)))
        .group_by(_deliveries.channel, _deliveries.state)
    )
    if open_only:
        query = query.where(alarms.c.acknowledged_at.is_(None))
    with store.reading() as connection:
        return {(channel, state): number for channel, state, number in connection.execute(query)}


def _untouched(subscription: Subscription) -> sql.ColumnElement[bool]:
    known = sql.exists().where(_deliveries.alarm_id == alarms.c.id, _deliveries.channel == subscription.channel)
    return sql.and_(subscription.condition, ~known)


def _under_way(connection: Connection, channel: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The alarms of the channel's message with their delivery's columns, oldest first."""
    of_delivery = [column for column in _deliveries if column.name not in ("alarm_id", "channel")]
    query = (
        sql.select(alarms, *of_delivery)
        .join(alarm_deliveries, _deliveries.alarm_id == alarms.c.id)
        .where(_deliveries.channel == channel, _deliveries.state == PENDING)
        .order_by(alarms.c.raised_at, alarms.c.id)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def _free(row: Mapping[str, Any], now: int) -> bool:
    return row["next_attempt_at"] <= now and (row["leased_until"] is None or row["leased_until"] <= now)


def _in_gap(connection: Connection, subscription: Subscription, gap_us: int, now: int) -> bool:
    if gap_us == 0:
        return False
    last = sql.select(sql.func.max(_deliveries.sent_at)).where(_deliveries.channel == subscription.channel)
    sent_at = connection.execute(last).scalar()
    # Not of a time to come, which another machine's clock gave.
    return sent_at is not None and now - gap_us < sent_at <= now


def _pass_over_old(connection: Connection, subscription: Subscription, oldest_us: int, now: int) -> None:
    known = sql.select(_deliveries.alarm_id).where(_deliveries.channel == subscription.channel).limit(1)
    first = connection.execute(known).first() is None
    state, error = (SKIPPED, "older than the channel") if first else (FAILED, "waited longer than max_age_h")
    row = {"channel": subscription.channel, "state": state, "attempts": 0, "next_attempt_at": now, "last_error": error}
    old = sql.select(alarms.c.id, *(sql.literal(value, _deliveries[name].type) for name, value in row.items()))
    old = old.where(_untouched(subscription), alarms.c.raised_at <= oldest_us)
    connection.execute(sql.insert(alarm_deliveries).from_select(["alarm_id", *row], old))


def _take_new(connection: Connection, subscription: Subscription, gap_us: int, now: int) -> list[dict[str, Any]]:
    if _in_gap(connection, subscription, gap_us, now):
        return []
    query = (
        sql.select(alarms).where(_untouched(subscription)).order_by(alarms.c.raised_at, alarms.c.id).limit(MAX_ALARMS)
    )
    new = connection.execute(query).mappings().all()
    row = {"channel": subscription.channel, "state": PENDING, "attempts": 0, "next_attempt_at": now}
    if new:
        connection.execute(sql.insert(alarm_deliveries), [{"alarm_id": alarm["id"], **row} for alarm in new])
    return [{**alarm, **row, "leased_until": None, "last_error": None} for alarm in new]


def _update(connection: Connection, channel: str, rows: list[dict[str, Any]], **values: Any) -> None:
    mine = sql.and_(_deliveries.channel == channel, _deliveries.alarm_id.in_([row["id"] for row in rows]))
    connection.execute(sql.update(alarm_deliveries).where(mine).values(**values))


def _settle(store: Store, delivery: Delivery, lease_held: bool, values: dict[str, Any]) -> bool:
    mine = [
        _deliveries.channel == delivery.channel,
        _deliveries.state == PENDING,
        _deliveries.alarm_id.in_([row["id"] for row in delivery.alarms]),
    ]
    if lease_held:
        # Each claim counts one more, so the count tells them apart, whatever the clocks of two machines say.
        mine.append(_deliveries.attempts == delivery.attempts)
    with store.writing() as connection:
        return connection.execute(sql.update(alarm_deliveries).where(*mine).values(**values)).rowcount > 0
