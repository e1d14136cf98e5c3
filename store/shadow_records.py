"""Shadow records: a challenger's answer to a request that the champion answered, beside the champion's record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.connection import ADVISORY_LOCK
from store.tables import predictions

SHADOW_SUFFIX = ".shadow"
# Ids per statement, below the fewest parameters that either database takes.
_CHUNK = 500


def shadow_id(champion_id: str) -> str:
    """The id of the shadow's record beside this one of the champion: one each, however often it is written."""
    return champion_id + SHADOW_SUFFIX


def is_shadow_id(prediction_id: str) -> bool:
    """Whether the id is one that `shadow_id` gives."""
    return prediction_id.endswith(SHADOW_SUFFIX)


def with_champions(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the rows whose champion's record is stored.

    A shadow answers later than the champion: what was erased in between must not come back with its answer. Call it in
    the transaction that inserts the rows.
    """
    if connection.dialect.name == "postgresql":
        # An erasure holds this lock exclusively. SQLite has one writer at a time anyway.
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock_shared(ADVISORY_LOCK + 1)))
    champions = sorted({row["id"].removesuffix(SHADOW_SUFFIX) for row in rows})
    stored: set[str] = set()
    for start in range(0, len(champions), _CHUNK):
        query = sql.select(predictions.c.id).where(predictions.c.id.in_(champions[start : start + _CHUNK]))
        stored |= set(connection.execute(query).scalars())
    return [row for row in rows if row["id"].removesuffix(SHADOW_SUFFIX) in stored]
