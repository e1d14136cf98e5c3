"""Reads alarms page by page and acknowledges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.tables import alarm_deliveries, alarms, now_us


def alarms_page(
    store: Store,
    unacknowledged: bool,
    kind: str | None,
    after: tuple[int, int] | None,
    limit: int,
    quieted: bool | None = None,
) -> list[dict[str, Any]]:
    """At most `limit` alarms, newest first; `deliveries`: state by channel, of the channels that took them up.

    Args:
        after: (raised_at, id) of the last alarm of the page before.
        quieted: only those that an earlier one quiets, or only the others; None: both.
    """
    table = alarms.c
    query = sql.select(alarms).order_by(table.raised_at.desc(), table.id.desc()).limit(limit)
    if unacknowledged:
        query = query.where(table.acknowledged_at.is_(None))
    if kind is not None:
        query = query.where(table.kind == kind)
    if quieted is not None:
        query = query.where(table.quieted_by.is_not(None) if quieted else table.quieted_by.is_(None))
    if after is not None:
        query = query.where(table.raised_at <= after[0], sql.or_(table.raised_at < after[0], table.id < after[1]))
    with store.reading() as connection:
        rows = [dict(row) for row in connection.execute(query).mappings()]
        return _with_deliveries(connection, rows)


def find_alarm(store: Store, alarm_id: int) -> dict[str, Any] | None:
    """The row of this id, or None."""
    query = sql.select(alarms).where(alarms.c.id == alarm_id)
    with store.reading() as connection:
        return next(map(dict, connection.execute(query).mappings()), None)


def count_repeats(store: Store, alarm_ids: Sequence[int]) -> dict[int, int]:
    """How many alarms each of these quiets, by id; those that quiet none are left out."""
    table = alarms.c
    query = sql.select(table.quieted_by, sql.func.count()).where(table.quieted_by.in_(alarm_ids))
    with store.reading() as connection:
        return {alarm_id: number for alarm_id, number in connection.execute(query.group_by(table.quieted_by))}


def acknowledge_alarm(store: Store, alarm_id: int, actor: str, comment: str | None) -> dict[str, Any] | None:
    """Marks an alarm as seen, and those that it quiets, with an audit entry; returns its row, or None where there is no
    such alarm.

    The first acknowledgement stays: a second one changes nothing but what was quieted since.
    """
    with store.writing() as connection:
        query = sql.select(alarms).where(alarms.c.id == alarm_id).with_for_update()
        found = connection.execute(query).mappings().first()
        if found is None:
            return None
        seen = {"acknowledged_at": now_us(), "acknowledged_by": actor}
        change: dict[str, Any] = {}
        if found["acknowledged_at"] is None:
            change = dict(seen)
            if comment is not None:
                # Here and not in the audit trail: it may say something of a patient, and an alarm's detail can be
                # erased.
                change["detail"] = {**found["detail"], "acknowledgement": comment}
            connection.execute(sql.update(alarms).where(alarms.c.id == alarm_id).values(**change))
        quiet = sql.update(alarms).where(alarms.c.quieted_by == alarm_id, alarms.c.acknowledged_at.is_(None))
        num_quieted = connection.execute(quiet.values(**seen)).rowcount
        if change or num_quieted:
            detail = {"kind": found["kind"], "quieted": num_quieted}
            store._append_audit(connection, actor, "acknowledge_alarm", f"alarm/{alarm_id}", detail)
        return _with_deliveries(connection, [{**found, **change}])[0]


def _with_deliveries(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    table = alarm_deliveries.c
    query = (
        sql.select(table.alarm_id, table.channel, table.state)
        .where(table.alarm_id.in_([row["id"] for row in rows]))
        .order_by(table.channel)
    )
    states: dict[int, dict[str, str]] = {}
    for alarm_id, channel, state in connection.execute(query):
        states.setdefault(alarm_id, {})[channel] = state
    return [{**row, "deliveries": states.get(row["id"], {})} for row in rows]
