"""Windows of the prediction log, for readers of many rows: chosen columns page by page, and what changed since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sql

from store.database import Store
from store.tables import audit, predictions

PAGE_ROWS = 5_000
# Prime, so that sums of times stay within 64 bits in any window and still tell moments apart.
_MODULUS = 1_000_000_007


RETENTION = "apply_retention"
"""The audit trail's word for a removal of what is past its retention; `detail` has `predictions_days` and what was
`due`."""
_DAY_US = 86_400_000_000


class WindowContent(NamedTuple):
    """What a window holds, of any model: two windows of the log with equal figures hold the same rows.

    Rows never change; they come late from a spool, and go with a patient's erasure. Each does either to the count or to
    the sum of the moments, which are microseconds: one row gone and another come would have to fall on the same one.
    """

    num_rows: int
    first_us: int
    last_us: int
    sum_of_moments: int


def window_content(store: Store, start_us: int, end_us: int, role: str = "champion") -> WindowContent:
    """The figures of the rows with start_us <= received_at < end_us, read from an index alone."""
    table = predictions.c
    query = sql.select(
        sql.func.count(),
        sql.func.min(table.received_at),
        sql.func.max(table.received_at),
        sql.func.sum((table.received_at - start_us) % _MODULUS),
    ).where(table.role == role, table.received_at >= start_us, table.received_at < end_us)
    with store.reading() as connection:
        return WindowContent(*(int(value or 0) for value in connection.execute(query).one()))


def model_versions(store: Store, start_us: int, end_us: int) -> dict[str, int]:
    """Predictions per model version with start_us <= received_at < end_us, shadows left out; most first."""
    table = predictions.c
    count = sql.func.count().label("num")
    query = (
        sql.select(table.model_version, count)
        .where(table.role == "champion", table.received_at >= start_us, table.received_at < end_us)
        .group_by(table.model_version)
        .order_by(count.desc(), table.model_version)
    )
    with store.reading() as connection:
        return {version: int(num) for version, num in connection.execute(query)}


def first_received(store: Store) -> int | None:
    """`received_at` of the oldest prediction, shadows left out; None in an empty log."""
    query = sql.select(sql.func.min(predictions.c.received_at)).where(predictions.c.role == "champion")
    with store.reading() as connection:
        return connection.execute(query).scalar()


def count_received_after(store: Store, moment_us: int) -> int:
    """Predictions with received_at > moment_us: with the present, those of a clock that runs ahead."""
    query = (
        sql.select(sql.func.count())
        .select_from(predictions)
        .where(predictions.c.role == "champion", predictions.c.received_at > moment_us)
    )
    with store.reading() as connection:
        return int(connection.execute(query).scalar() or 0)


def whole_since(store: Store) -> int | None:
    """The moment (microseconds UTC) before which retention has removed predictions: of a window that begins earlier
    the log may hold the labelled rows alone. None: it has removed none."""
    entries = sql.select(audit.c.at, audit.c.detail).where(audit.c.subject == "store", audit.c.action == RETENTION)
    with store.reading() as connection:
        removals = [(at, detail) for at, detail in connection.execute(entries) if detail["due"].get("predictions")]
    return max((at - round(detail["predictions_days"] * _DAY_US) for at, detail in removals), default=None)


def was_seen(store: Store, column: str, value: str, start_us: int, end_us: int) -> bool:
    """Whether a prediction with start_us <= received_at < end_us has this institution or device (`column`)."""
    table = predictions.c
    query = (
        sql.select(table.received_at)
        .where(table.role == "champion", table.received_at >= start_us, table.received_at < end_us)
        .where(table[column] == value)
        .limit(1)
    )
    with store.reading() as connection:
        return connection.execute(query).first() is not None


def prediction_pages(
    store: Store,
    columns: Sequence[str],
    start_us: int,
    end_us: int,
    max_rows: int | None = None,
    page_rows: int = PAGE_ROWS,
    role: str = "champion",
) -> Iterator[Sequence[Sequence[Any]]]:
    """Rows with start_us <= received_at < end_us by (received_at, id), a page of tuples at a time.

    No transaction stays open between pages: a long reading holds up neither writers nor SQLite's checkpoints.

    Args:
        columns: of `predictions`; each row is a tuple in their order.
        max_rows: only the first ones.
    """
    table = predictions.c
    after, left = (start_us, ""), max_rows
    while left is None or left > 0:
        size = page_rows if left is None else min(page_rows, left)
        query = (
            sql.select(*(table[name] for name in columns), table.received_at.label("_at"), table.id.label("_id"))
            .where(table.role == role, table.received_at >= after[0], table.received_at < end_us)
            .where(sql.or_(table.received_at > after[0], table.id > after[1]))
            .order_by(table.received_at, table.id)
            .limit(size)
        )
        with store.reading() as connection:
            page = connection.execute(query).all()
        if page:
            yield [row[: len(columns)] for row in page]
        if len(page) < size:
            return
        after = (page[-1][-2], page[-1][-1])
        left = None if left is None else left - len(page)
