"""What a page costs the store stays small on a long log, in instructions of SQLite's: no clock here is fair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from serve.access import PAGE_ROLES
from store.tables import now_us
from tests.bundle_factory import lesion_image
from tests.log_rows import label_row, prediction_row
from tests.model_facts import a_candidate_and_a_champion

ROWS = 30_000
DAY_US = 86_400_000_000
# An instruction takes 5 to 10 ns here, reading included: a tenth of the 200 ms that a page may take.
MAX_INSTRUCTIONS = 2_500_000
STEP = 100


def a_month(store) -> None:
    """30 days of predictions, of which every hundredth has a label."""
    now = now_us()
    rows = []
    for number in range(ROWS):
        at = now - number * 30 * DAY_US // ROWS
        values = {"risk": (number * 7919 % 1000) / 1000, "threshold": 0.5, "band": "low", "stage_ms": {"total": 12.5}}
        values |= {"patient_hmac": f"{number % 3000:064x}", "image_hash": f"{number:064x}", "model_version": "3"}
        rows.append(prediction_row(f"p{number}", received_at=at, **values))
    for start in range(0, ROWS, 5000):
        store.insert_predictions(rows[start : start + 5000])
    with store.writing() as connection:
        from store.tables import labels

        made = [label_row(f"p{number}", labelled_at=now, source="api") for number in range(0, ROWS, 100)]
        connection.execute(labels.insert(), made)
    a_candidate_and_a_champion(store)


@contextmanager
def counted(store) -> Iterator[list[int]]:
    """Counts the instructions of every statement on this store, to within `STEP` each."""
    count = [0]

    def more() -> int:
        count[0] += STEP
        return 0

    def watch(connection, _record, _proxy) -> None:
        connection.set_progress_handler(more, STEP)

    def leave(connection, _record) -> None:
        connection.set_progress_handler(None, 0)

    event.listen(store.engine, "checkout", watch)
    event.listen(store.engine, "checkin", leave)
    try:
        yield count
    finally:
        event.remove(store.engine, "checkout", watch)
        event.remove(store.engine, "checkin", leave)


@pytest.fixture(scope="module")
def busy(reference, nodes, tmp_path_factory):
    from tests.local_service import LocalService

    made = LocalService(reference, tmp_path_factory.mktemp("month"), nodes=nodes)
    files = {"image": ("1.jpg", lesion_image(1), "image/jpeg")}
    assert made.client.post("/v1/predict", files=files).status_code == 200
    a_month(made.log.store)
    yield made
    made.log.store.close()


@pytest.mark.parametrize("page", sorted(set(PAGE_ROLES) - {"sign-out", "sign-in"}))
def test_a_page_asks_the_store_for_little_however_long_the_log_is(busy, page):
    path = {"results": "/results/page-none?n=1"}.get(page, f"/{page}")
    with counted(busy.log.store) as count:
        assert busy.client.get(path).status_code in (200, 404)
    assert count[0] <= MAX_INSTRUCTIONS, f"{path}: {count[0]:,} instructions"
    print(f"{path}: {count[0]:,} instructions")


def test_a_scan_of_the_log_would_be_seen(busy):
    with counted(busy.log.store) as count, busy.log.store.reading() as connection:
        connection.exec_driver_sql("SELECT sum(risk) FROM predictions").scalar()
    assert count[0] > ROWS
