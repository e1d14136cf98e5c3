"""The stored drift reports of one model: its newest windows, and one report as a whole."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import drift_reports


def drift_history(store: Store, model_version: str, reference: str, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` windows of a model, oldest first: `id`, `window_start`, `window_end`, `status`, `num_rows`,
    `alarm`, `drifted`, and of the statistics `features`, `embedding` and `problems` (of the quality) alone; None where
    there are none.

    Of a window that was judged again when labels came, the newest verdict counts.

    Args:
        model_version: of the registry; reference: digest of its bundle, under which a check by bundle is stored.
    """
    table = drift_reports.c
    place = sql.func.row_number().over(
        partition_by=[table.window_start, table.window_end], order_by=[table.label_watermark.desc(), table.id.desc()]
    )
    own = sql.or_(table.model_version == model_version, table.reference == reference)
    ranked = sql.select(table.id, table.window_end, table.window_start, place.label("place")).where(own).subquery()
    newest = (
        sql.select(ranked.c.id)
        .where(ranked.c.place == 1)
        .order_by(ranked.c.window_end.desc(), ranked.c.window_start.desc())
        .limit(limit)
    )
    names = ("id", "window_start", "window_end", "status", "num_rows", "alarm", "drifted")
    # Parts: of a window with many institutions the rest of the statistics is a hundred times as large.
    parts = [table.statistics[name].label(name) for name in ("features", "embedding")]
    parts.append(table.statistics[("quality", "problems")].label("problems"))
    query = sql.select(*(table[name] for name in names), *parts).where(table.id.in_(newest))
    with store.reading() as connection:
        rows = connection.execute(query.order_by(table.window_end, table.window_start)).mappings()
        return [dict(row) for row in rows]


def find_drift_report(store: Store, report_id: int) -> dict[str, Any] | None:
    """The row of this id, or None."""
    query = sql.select(drift_reports).where(drift_reports.c.id == report_id)
    with store.reading() as connection:
        return next(map(dict, connection.execute(query).mappings()), None)
