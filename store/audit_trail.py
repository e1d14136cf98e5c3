"""The audit trail as the database holds it, page by page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sql

from store.database import Store
from store.tables import audit

_PAGE_ROWS = 500


def stored_entries(store: Store) -> Iterator[dict[str, Any]]:
    """All audit entries by id, a page in memory at a time, and whatever was appended meanwhile.

    A `detail` that is no JSON, which someone must have written past the store, stays text.

    Raises:
        StoreUnavailableError: the database does not answer.
    """
    # As text: SQLite takes any text for JSON, and a whole page would fail for one of its rows.
    columns = [sql.cast(column, sql.Text).label("detail") if column is audit.c.detail else column for column in audit.c]
    query = sql.select(*columns).order_by(audit.c.id).limit(_PAGE_ROWS)
    page_query = query
    while True:
        with store.reading() as connection:
            page = [dict(row) for row in connection.execute(page_query).mappings()]
        for entry in page:
            entry["detail"] = _parsed(entry["detail"])
            yield entry
        if len(page) < _PAGE_ROWS:
            return
        page_query = query.where(audit.c.id > page[-1]["id"])


def _parsed(detail: str) -> Any:
    try:
        return json.loads(detail)
    except (TypeError, ValueError, RecursionError):
        return detail
