"""What a page costs the store beside a log that grows, in statements and in instructions of SQLite's: no clock is fair
here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from sqlalchemy import event

from serve.access import PAGE_ROLES
from store.review_queue import MAX_ORDERED
from store.tables import alarms, images, labels, now_us, predictions
from tests.bundle_factory import lesion_image
from tests.local_service import LocalService
from tests.log_rows import label_row, prediction_row
from tests.model_facts import a_candidate_and_a_champion
from tests.monitored_month import a_drift_report

ROWS, TIMES = 3_000, 10
DAY_US = 86_400_000_000
STEP = 100
# A page that looks through a log of ten times the size takes ten times the instructions.
MAX_GROWTH = 4.0
FEW = 10_000
# Where everything is read, `/review` has to look at each row of the last 30 days; it did so four times.
MAX_PER_ROW_READ = 60
A_LOOK_THROUGH_THE_LOG = "SELECT"
# By page of `PAGE_ROLES`; {results}: of one form with three pictures.
PATHS: dict[str, tuple[str, ...]] = {
    "": ("/",),
    "results": ("{results}",),
    "review": ("/review", "/review/label-studio"),
    "monitoring": ("/monitoring", "/monitoring?hours=168", "/monitoring?show=all"),
    "models": ("/models",),
    "about": ("/about",),
    "sign-in": ("/sign-in",),
    "sign-out": (),
}


@dataclass(frozen=True)
class Cost:
    """Of one page: SQLite's instructions, to within `STEP` a statement, and statements."""

    instructions: int
    statements: int


def fill(store, rows: int, days: int, every_read: int) -> None:
    """So many days of predictions with their pictures, one in `every_read` of them read, an alarm for each
    hundred, and a drift report a day."""
    now = now_us()
    made, pictures, said, raised = [], [], [], []
    for number in range(rows):
        at = now - number * days * DAY_US // rows
        values = {"risk": (number * 7919 % 1000) / 1000, "threshold": 0.5, "band": "low", "stage_ms": {"total": 12.5}}
        values |= {
            "patient_hmac": f"{number % (rows // 10):064x}",
            "image_hash": f"{number:064x}",
            "model_version": "3",
        }
        made.append(prediction_row(f"p{number}", received_at=at, **values))
        pictures.append({"hash": f"{number:064x}", "suffix": ".jpg", "num_bytes": 9, "stored_at": at})
        if number % every_read == 0:
            said.append(label_row(f"p{number}", labelled_at=at, labeller=f"reader {number % 7}", source="api"))
        if number % 100 == 0:
            alarm = {"dedupe_key": f"drift:{number}", "kind": "drift", "severity": "warning", "raised_at": at}
            raised.append(alarm | {"message": "drift", "detail": {}, "model_version": "3"})
    with store.writing() as connection:
        for table, found in ((predictions, made), (images, pictures), (labels, said), (alarms, raised)):
            connection.execute(table.insert(), found)
    for days_ago in range(1, days):
        a_drift_report(store, days_ago, ("sex",) if days_ago % 30 == 0 else ())
    a_candidate_and_a_champion(store)


@contextmanager
def counted(store) -> Iterator[dict[str, int]]:
    """Counts the statements on this store, and their instructions to within `STEP` each."""
    count = {"instructions": 0, "statements": 0}

    def more() -> int:
        count["instructions"] += STEP
        return 0

    def watch(connection, _record, _proxy) -> None:
        connection.set_progress_handler(more, STEP)

    def leave(connection, _record) -> None:
        connection.set_progress_handler(None, 0)

    def note(*_) -> None:
        count["statements"] += 1

    listeners = (("checkout", watch), ("checkin", leave), ("before_cursor_execute", note))
    for name, listener in listeners:
        event.listen(store.engine, name, listener)
    try:
        yield count
    finally:
        for name, listener in listeners:
            event.remove(store.engine, name, listener)


def costs(local: LocalService) -> dict[str, Cost]:
    """Of every page, by path."""
    client = local.client
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', client.get("/").text))
    files = [("images", (f"{seed}.jpg", lesion_image(seed), "image/jpeg")) for seed in range(3)]
    assert client.post("/", data=fields, files=files).status_code == 200
    found = {}
    for path in (path for paths in PATHS.values() for path in paths):
        with counted(local.log.store) as count:
            answer = client.get(path.format(results=f"/results/{fields['key']}?n=3"))
        assert answer.status_code == 200, f"{path}: {answer.status_code}"
        assert path != "{results}" or answer.text.count("<tr") > 3
        found[path] = Cost(**count)
    with counted(local.log.store) as count, local.log.store.reading() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM predictions WHERE risk > 0.5").scalar()
    return {**found, A_LOOK_THROUGH_THE_LOG: Cost(**count)}


@pytest.fixture(scope="module")
def measured(reference, nodes, tmp_path_factory):
    """Costs by kind of log: one month; ten of the like; one month of ten times the traffic, all of it read."""
    found = {}
    for name, months, traffic, every_read in (("short", 1, 1, 5), ("long", TIMES, 1, 5), ("read", 1, TIMES, 1)):
        local = LocalService(reference, tmp_path_factory.mktemp(name), nodes=nodes)
        fill(local.log.store, months * traffic * ROWS, 30 * months, every_read)
        found[name] = costs(local)
        local.log.store.close()
    return found


def test_every_page_is_measured_on_a_queue_that_is_full():
    assert set(PATHS) == set(PAGE_ROLES)
    # Else the queue of a longer log were longer too.
    assert ROWS * 4 // 5 > MAX_ORDERED


@pytest.mark.parametrize("path", [path for paths in PATHS.values() for path in paths])
def test_a_page_costs_the_store_about_the_same_beside_ten_times_the_log(measured, path):
    short, long = measured["short"][path], measured["long"][path]
    print(f"{path}: {short} {long} {measured['read'][path]}")
    assert long.statements == short.statements
    assert long.instructions <= MAX_GROWTH * short.instructions + FEW


@pytest.mark.parametrize("path", [path for paths in PATHS.values() for path in paths])
def test_a_page_looks_through_a_log_that_is_all_read_once_at_most(measured, path):
    assert measured["read"][path].instructions <= MAX_PER_ROW_READ * TIMES * ROWS


def test_a_look_through_the_log_would_be_seen(measured):
    short, long = (measured[log][A_LOOK_THROUGH_THE_LOG] for log in ("short", "long"))
    assert long.instructions > MAX_GROWTH * short.instructions + FEW
