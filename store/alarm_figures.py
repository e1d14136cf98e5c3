"""What Prometheus watches of the store: open alarms, the newest drift reports, labels."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import alarms, drift_reports, labels


def open_alarms(store: Store) -> dict[tuple[str, str], int]:
    """Alarms that no one has acknowledged and no earlier one quiets, by (kind, severity)."""
    query = (
        sql.select(alarms.c.kind, alarms.c.severity, sql.func.count())
        .where(alarms.c.acknowledged_at.is_(None), alarms.c.quieted_by.is_(None))
        .group_by(alarms.c.kind, alarms.c.severity)
    )
    with store.reading() as connection:
        return {(kind, severity): number for kind, severity, number in connection.execute(query)}


def newest_reports(store: Store, since_us: int) -> list[dict[str, Any]]:
    """The drift report of the newest window of each model, the last one made where there are several; rows of
    `drift_reports`.

    Args:
        since_us: windows that ended before it count for nothing (microseconds UTC).
    """
    table = drift_reports.c
    place = sql.func.row_number().over(
        partition_by=table.model_version, order_by=[table.window_end.desc(), table.created_at.desc(), table.id.desc()]
    )
    ranked = sql.select(table.id, place.label("place")).where(table.window_end >= since_us).subquery()
    newest = sql.select(ranked.c.id).where(ranked.c.place == 1)
    query = sql.select(drift_reports).where(table.id.in_(newest)).order_by(table.model_version)
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def count_labels(store: Store) -> dict[bool, int]:
    """Labels, with those that a later one of the same reader replaces: malignant ones, and others."""
    query = sql.select(labels.c.malignant, sql.func.count()).group_by(labels.c.malignant)
    with store.reading() as connection:
        return {True: 0, False: 0} | {bool(malignant): number for malignant, number in connection.execute(query)}
