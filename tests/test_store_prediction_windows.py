"""Windows of the log on both databases: what they hold, and reading them page by page."""

from __future__ import annotations

import uuid

import pytest
import sqlalchemy as sql

from store.database import open_store
from store.prediction_windows import (
    count_received_after,
    first_received,
    model_versions,
    prediction_pages,
    was_seen,
    window_content,
)
from store.tables import now_us, predictions
from tests.log_rows import prediction_row

# As large as the service's: a sum of a day's own times passes 64 bits.
DAY_US = 86_400_000_000
START = now_us() // DAY_US * DAY_US


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def write(store, moments, **values):
    rows = [prediction_row(uuid.uuid4().hex, received_at=moment, **values) for moment in moments]
    with store.writing() as connection:
        connection.execute(sql.insert(predictions), rows)
    return rows


def test_a_row_that_comes_or_goes_changes_what_a_window_holds(store):
    assert window_content(store, START, START + DAY_US) == (0, 0, 0, 0)
    rows = write(store, range(START, START + DAY_US, DAY_US // 20_000))
    write(store, [START + 5], role="shadow")
    write(store, [START - 1, START + DAY_US])
    whole = window_content(store, START, START + DAY_US)
    assert whole[:3] == (20_000, START, rows[-1]["received_at"]) and all(type(value) is int for value in whole)
    assert sum(row["received_at"] for row in rows) > 2**63
    with store.writing() as connection:
        connection.execute(sql.delete(predictions).where(predictions.c.id == rows[700]["id"]))
    write(store, [rows[700]["received_at"] + 1])
    changed = window_content(store, START, START + DAY_US)
    assert changed[:3] == whole[:3] and changed != whole


@pytest.mark.parametrize("max_rows", [None, 3, 7])
def test_pages_hold_each_row_once_though_many_came_at_the_same_moment(store, max_rows):
    rows = write(store, [START, *[START + 1] * 6, START + DAY_US - 1])
    write(store, [START + 1], role="shadow")
    ordered = sorted((row["received_at"], row["id"]) for row in rows)
    pages = list(prediction_pages(store, ("received_at", "id"), START, START + DAY_US, max_rows, page_rows=2))
    assert [tuple(row) for page in pages for row in page] == ordered[:max_rows]
    assert all(1 <= len(page) <= 2 for page in pages)


def test_who_answered_and_where(store):
    assert first_received(store) is None and model_versions(store, START, START + DAY_US) == {}
    write(store, [START + 9, START + 8], model_version="2", institution="north")
    write(store, [START + 7], model_version="1", institution=None)
    write(store, [START], role="shadow", model_version="3", institution="south")
    assert first_received(store) == START + 7
    assert list(model_versions(store, START, START + DAY_US).items()) == [("2", 2), ("1", 1)]
    assert was_seen(store, "institution", "north", START, START + 9)
    assert not was_seen(store, "institution", "north", START, START + 8)
    assert not was_seen(store, "institution", "south", START, START + DAY_US)
    assert count_received_after(store, START + 8) == 1
