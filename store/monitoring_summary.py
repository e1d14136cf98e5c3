"""What the service did in a window of time, counted by the database."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.labels import MISSED_CANCER
from store.shadow_agreement import shadow_agreements
from store.tables import alarms, drift_reports, labels, predictions

HOUR_US = 3_600_000_000
# Enough for a 95th percentile to within a few tenths of a percent of rank, and a 99th to within two; read in 30 ms.
TIMED_PREDICTIONS = 10_000


def monitoring_summary(store: Store, end_us: int, hours: int) -> dict[str, Any]:
    """Counts over [end_us - hours, end_us), champion's records only.

    Keys: `start_us`, `end_us`, `predictions`, `abstained`, `by_band`, `by_model_version`, `abstention_reasons` (one
    record may have several), `per_hour` (`hours` entries, oldest first: `start_us`, `predictions`, `abstained`),
    `total_ms` (mean, median, p95 and p99 of the newest `TIMED_PREDICTIONS` records; None without any), `drift` (latest
    report per model, of any time), `unacknowledged_alarms` (by kind, of any time, without those that an earlier one
    quiets), `labels`, `missed_cancers` (alarms),
    `shadow` (`ShadowAgreement` by champion and shadow, their ranks over the newest `TIMED_PREDICTIONS` pairs).
    """
    start_us = end_us - hours * HOUR_US
    with store.reading() as connection:
        return {
            "start_us": start_us,
            "end_us": end_us,
            **_counts(connection, start_us, end_us, hours),
            "total_ms": _timing(connection, start_us, end_us),
            "drift": _drift(connection),
            "unacknowledged_alarms": _unacknowledged(connection),
            "labels": _count(connection, labels.c.labelled_at, start_us, end_us),
            "missed_cancers": _count(connection, alarms.c.raised_at, start_us, end_us, alarms.c.kind == MISSED_CANCER),
            "shadow": [asdict(pair) for pair in shadow_agreements(connection, start_us, end_us, TIMED_PREDICTIONS)],
        }


def count_answers(store: Store, start_us: int, end_us: int) -> tuple[int, int]:
    """The champion's answers received in [start_us, end_us), and those of them without a risk."""
    given = sql.func.count(), sql.func.coalesce(sql.func.sum(sql.case((predictions.c.abstained, 1), else_=0)), 0)
    with store.reading() as connection:
        return tuple(connection.execute(sql.select(*given).where(*_in_window(start_us, end_us))).one())


def answered_before(store: Store, model_version: str, before_us: int, limit: int = 1_000) -> bool:
    """Whether this model gave one of the newest `limit` answers received before `before_us` (microseconds UTC)."""
    table = predictions.c
    newest = (
        sql.select(table.model_version)
        .where(table.role == "champion", table.received_at < before_us)
        .order_by(table.received_at.desc())
        .limit(limit)
        .subquery()
    )
    with store.reading() as connection:
        return connection.execute(sql.select(sql.exists().where(newest.c.model_version == model_version))).scalar_one()


def _in_window(start_us: int, end_us: int) -> list[sql.ColumnElement[bool]]:
    table = predictions.c
    return [table.role == "champion", table.received_at >= start_us, table.received_at < end_us]


def _counts(connection: Connection, start_us: int, end_us: int, hours: int) -> dict[str, Any]:
    table = predictions.c
    # Inlined rather than bound: PostgreSQL takes an expression with parameters in SELECT and in GROUP BY for two.
    start, width = (sql.literal_column(str(value), sql.BigInteger) for value in (start_us, HOUR_US))
    hour = ((table.received_at - start) // width).label("hour")
    # As text: there are few combinations, and neither database compares JSON the same way. In the same pass: most of
    # its time goes into reading the rows.
    reasons = sql.case((table.abstained, sql.cast(table.reasons, sql.Text))).label("given_reasons")
    keys = (hour, table.model_version, table.band, table.abstained, reasons)
    query = sql.select(*keys, sql.func.count()).where(*_in_window(start_us, end_us)).group_by(*keys)
    per_hour, abstained_per_hour = [0] * hours, [0] * hours
    bands: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    given: Counter[str] = Counter()
    for index, version, band, abstained, why, count in connection.execute(query):
        per_hour[index] += count
        versions[version] += count
        if band is not None:
            bands[band] += count
        if abstained:
            abstained_per_hour[index] += count
            for reason in set(json.loads(why)):
                given[reason] += count
    return {
        "predictions": sum(per_hour),
        "abstained": sum(abstained_per_hour),
        "by_band": dict(bands),
        "by_model_version": dict(versions),
        "abstention_reasons": dict(given),
        "per_hour": [
            {"start_us": start_us + index * HOUR_US, "predictions": per_hour[index], "abstained": refused}
            for index, refused in enumerate(abstained_per_hour)
        ],
    }


def _timing(connection: Connection, start_us: int, end_us: int) -> dict[str, float] | None:
    query = (
        sql.select(predictions.c.stage_ms["total"].as_float())
        .where(*_in_window(start_us, end_us))
        .order_by(predictions.c.received_at.desc())
        .limit(TIMED_PREDICTIONS)
    )
    values = [float(value) for value in connection.execute(query).scalars() if value is not None]
    if not values:
        return None
    median, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99])
    return {"mean": float(np.mean(values)), "median": float(median), "p95": float(p95), "p99": float(p99)}


def _drift(connection: Connection) -> list[dict[str, Any]]:
    table = drift_reports.c
    names = ("model_version", "window_start", "window_end", "status", "alarm", "drifted", "created_at")
    place = sql.func.row_number().over(
        partition_by=table.model_version, order_by=[table.window_end.desc(), table.created_at.desc(), table.id.desc()]
    )
    ranked = sql.select(*(table[name] for name in names), place.label("place")).subquery()
    query = sql.select(*(ranked.c[name] for name in names)).where(ranked.c.place == 1).order_by(ranked.c.model_version)
    return [dict(row) for row in connection.execute(query).mappings()]


def _unacknowledged(connection: Connection) -> dict[str, int]:
    query = (
        sql.select(alarms.c.kind, sql.func.count())
        .where(alarms.c.acknowledged_at.is_(None), alarms.c.quieted_by.is_(None))
        .group_by(alarms.c.kind)
    )
    return {kind: count for kind, count in connection.execute(query)}


def _count(
    connection: Connection, at: sql.Column[int], start_us: int, end_us: int, *conditions: sql.ColumnElement[bool]
) -> int:
    query = sql.select(sql.func.count()).where(at >= start_us, at < end_us, *conditions)
    return connection.execute(query).scalar_one()
