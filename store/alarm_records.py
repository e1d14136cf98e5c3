"""Reads alarms page by page and acknowledges them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import alarms, now_us


def alarms_page(
    store: Store, unacknowledged: bool, kind: str | None, after: tuple[int, int] | None, limit: int
) -> list[dict[str, Any]]:
    """At most `limit` alarms, newest first.

    Args:
        after: (raised_at, id) of the last alarm of the page before.
    """
    table = alarms.c
    query = sql.select(alarms).order_by(table.raised_at.desc(), table.id.desc()).limit(limit)
    if unacknowledged:
        query = query.where(table.acknowledged_at.is_(None))
    if kind is not None:
        query = query.where(table.kind == kind)
    if after is not None:
        query = query.where(table.raised_at <= after[0], sql.or_(table.raised_at < after[0], table.id < after[1]))
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def acknowledge_alarm(store: Store, alarm_id: int, actor: str, comment: str | None) -> dict[str, Any] | None:
    """Marks an alarm as seen, with an audit entry; returns its row, or None where there is no such alarm.

    The first acknowledgement stays: a second one changes nothing.
    """
    with store.writing() as connection:
        query = sql.select(alarms).where(alarms.c.id == alarm_id).with_for_update()
        found = connection.execute(query).mappings().first()
        if found is None or found["acknowledged_at"] is not None:
            return None if found is None else dict(found)
        change: dict[str, Any] = {"acknowledged_at": now_us(), "acknowledged_by": actor}
        if comment is not None:
            # Here and not in the audit trail: it may say something of a patient, and an alarm's detail can be erased.
            change["detail"] = {**found["detail"], "acknowledgement": comment}
        connection.execute(sql.update(alarms).where(alarms.c.id == alarm_id).values(**change))
        store._append_audit(connection, actor, "acknowledge_alarm", f"alarm/{alarm_id}", {"kind": found["kind"]})
        return {**found, **change}
