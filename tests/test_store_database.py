"""The store keeps what it was given, once, whoever else writes, and refuses what is not a store."""

from __future__ import annotations

import fcntl
import multiprocessing
import sqlite3
import threading

import pytest
import sqlalchemy as sql
from sqlalchemy.dialects import postgresql

from store import connection, database
from store.database import StoreUnavailableError, open_store
from store.tables import SCHEMA_VERSION, schema, schema_version
from tests.log_rows import prediction_row

# Every test runs on SQLite; these on PostgreSQL too.
on_both = pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True
)


@pytest.fixture
def url(request, tmp_path):
    if getattr(request, "param", "sqlite") == "postgresql":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def store(url):
    opened = open_store(url)
    yield opened
    opened.close()


def ids(store, **window):
    return [row["id"] for row in store.predictions_between(0, 2**62, **window)]


def _write_many(url: str, name: str, start) -> None:
    start.wait()
    store = open_store(url)
    for index in range(10):
        store.insert_predictions([prediction_row(f"{name}-{index}")])
        store.append_audit(name, "write", f"prediction/{index}", {})
    store.close()


def test_processes_that_open_and_fill_one_new_store_at_once_lose_nothing(url):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    processes = [context.Process(target=_write_many, args=(url, f"writer{i}", start)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = open_store(url)
    assert len(ids(store)) == 30
    assert database.audit_chain.verify(store.audit_entries()) == 30


def test_openers_of_a_new_store_go_one_by_one(url, tmp_path):
    opened = threading.Event()

    def open_it() -> None:
        open_store(url).close()
        opened.set()

    with open(tmp_path / "store.db.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opener = threading.Thread(target=open_it)
        opener.start()
        assert not opened.wait(0.3) and not (tmp_path / "store.db").exists()
    opener.join(30)
    assert opened.is_set()


def test_commits_are_synced_and_readers_do_not_block_writers(store):
    with store.reading() as connection:
        assert connection.execute(sql.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sql.text("PRAGMA synchronous")).scalar() == 2  # FULL
        connection.execute(sql.text("SELECT count(*) FROM predictions"))
        assert store.insert_predictions([prediction_row("a")]).num_new == 1


@on_both
def test_a_prediction_is_stored_once_and_the_first_row_wins(store):
    assert store.insert_predictions([prediction_row("a", risk=0.1), prediction_row("b")]).num_new == 2
    assert store.insert_predictions([prediction_row("a", risk=0.9), prediction_row("c")]).num_new == 1
    assert ids(store) == ["a", "b", "c"]
    assert store.find_prediction("a")["risk"] == 0.1
    assert store.find_prediction("z") is None


@on_both
def test_one_idempotency_key_holds_one_prediction_per_caller(store):
    twice = [prediction_row("a", idempotency_key="k"), prediction_row("b", idempotency_key="k")]
    assert store.insert_predictions(twice).num_new == 1
    assert store.insert_predictions([prediction_row("c", idempotency_key="k")]).num_new == 0
    assert store.insert_predictions([prediction_row("d", idempotency_key="k", caller="other")]).num_new == 1
    assert store.find_by_idempotency_key("clinic", "k")["id"] == "a"
    assert store.find_by_idempotency_key("other", "k")["id"] == "d"
    assert store.find_by_idempotency_key("third", "k") is None


def test_a_value_that_is_no_json_is_refused(store):
    with pytest.raises(ValueError, match="refuses a row"):
        store.insert_predictions([prediction_row("a"), prediction_row("b", metadata={"x": object()})])
    assert ids(store) == []


@on_both
def test_a_refused_row_takes_its_whole_transaction_back(store):
    image = {"hash": "h", "suffix": ".jpg", "num_bytes": 3, "stored_at": 1}
    with pytest.raises(ValueError, match="refuses a row"):
        store.insert_predictions([prediction_row("a"), prediction_row("b", model_version=None)], [image])
    assert ids(store) == [] and store.image_suffix("h") is None
    store.insert_predictions([prediction_row("a")], [image])
    assert store.image_suffix("h") == ".jpg"


@on_both
def test_a_window_is_read_in_order_across_pages(store, monkeypatch):
    monkeypatch.setattr(database, "_PAGE_ROWS", 3)
    rows = [prediction_row(f"r{index}", received_at=1_000 + index // 4) for index in range(11)]
    store.insert_predictions(
        rows[::-1] + [prediction_row("early", received_at=999), prediction_row("late", received_at=1_003)]
    )
    store.insert_predictions([prediction_row("shadow", role="shadow")])
    found = [row["id"] for row in store.predictions_between(1_000, 1_003)]
    assert found == sorted(row["id"] for row in rows if row["received_at"] < 1_001) + sorted(
        row["id"] for row in rows if row["received_at"] == 1_001
    ) + sorted(row["id"] for row in rows if row["received_at"] == 1_002)
    assert ids(store, role="shadow") == ["shadow"]


def test_a_locked_store_says_so_and_takes_the_same_rows_later(url, monkeypatch):
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_MS", 50)
    store = open_store(url)
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked"):
        store.insert_predictions([prediction_row("a")])
    other.execute("COMMIT")
    assert store.insert_predictions([prediction_row("a")]).num_new == 1


def drift_row(**values) -> dict:
    base = {
        "window_start": 0,
        "window_end": 10,
        "model_version": "1",
        "reference": "abc",
        "label_watermark": 0,
        "status": "ok",
        "num_rows": 60,
        "num_groups": 12,
        "alarm": False,
        "drifted": [],
        "statistics": {"red": 0.1 + 0.2},
        "input_digest": "d",
        "report": None,
    }
    return base | values


def test_a_window_has_one_drift_row_per_label_watermark(store, tmp_path):
    assert store.upsert_drift_report(drift_row()) is True
    before = store.drift_reports()
    bytes_before = [(tmp_path / name).read_bytes() for name in ("store.db", "store.db-wal")]
    assert store.upsert_drift_report(drift_row()) is False
    assert [(tmp_path / name).read_bytes() for name in ("store.db", "store.db-wal")] == bytes_before
    assert store.upsert_drift_report(drift_row(status="drift", alarm=True, drifted=["red"])) is True
    (row,) = store.drift_reports()
    assert (row["status"], row["drifted"], row["id"]) == ("drift", ["red"], before[0]["id"])
    assert row["created_at"] == before[0]["created_at"]
    store.upsert_drift_report(drift_row(label_watermark=7))
    assert [row["label_watermark"] for row in store.drift_reports(0, 10)] == [0, 7]
    assert store.find_drift_report(drift_row(label_watermark=7))["status"] == "ok"
    assert store.find_drift_report(drift_row(label_watermark=8)) is None
    assert store.drift_reports(1) == []


@on_both
def test_label_watermark_counts_labels_of_the_window_only(store):
    store.insert_predictions([prediction_row("a", received_at=5), prediction_row("b", received_at=15)])
    label = {"label": "nv", "malignant": False, "labeller": "x", "labelled_at": 1}
    with store.writing() as writer:
        writer.execute(database.labels.insert(), [{**label, "prediction_id": "a"}, {**label, "prediction_id": "b"}])
    assert (store.label_watermark(0, 10), store.label_watermark(10, 20), store.label_watermark(20, 30)) == (1, 2, 0)


@on_both
def test_an_alarm_is_raised_once_even_by_two_at_a_time(store):
    alarm = {"dedupe_key": "k", "kind": "drift", "severity": "warning", "message": "m", "detail": {}}
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(store.raise_alarm(alarm))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False, False, False, True]
    assert len(store.alarms(unacknowledged_only=True)) == 1
    assert store.raise_alarm({**alarm, "dedupe_key": "k2"}) is True
    assert [row["dedupe_key"] for row in store.alarms()] == ["k2", "k"]


@on_both
def test_writers_at_once_leave_one_unbroken_audit_chain(store):
    def write(name: str) -> None:
        for index in range(10):
            store.append_audit(name, "write", f"prediction/{index}", {"risk": 0.1 + 0.2})

    threads = [threading.Thread(target=write, args=(f"writer{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert database.audit_chain.verify(store.audit_entries()) == 40


@on_both
def test_an_approval_leaves_an_audit_entry(store):
    first = store.record_approval("3", "Dr Weber", "better on the gate split", gate={"auc": 0.93})
    second = store.record_approval("2", "Dr Weber", "slow", decision="rollback")
    assert [(row["id"], row["decision"]) for row in store.approvals()] == [(second, "rollback"), (first, "promote")]
    assert [(e["actor"], e["subject"]) for e in store.audit_entries()] == [
        ("Dr Weber", "model/3"),
        ("Dr Weber", "model/2"),
    ]


@on_both
def test_another_schema_version_is_refused_in_one_line(store, url):
    with store.writing() as writer:
        writer.execute(sql.update(schema_version).values(version=99))
    with pytest.raises(ValueError, match=f"schema version 99; this release reads version {SCHEMA_VERSION}") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    foreign = tmp_path / "mlflow.db"
    with sqlite3.connect(foreign) as other:
        other.execute("CREATE TABLE experiments (id INTEGER)")
    with pytest.raises(ValueError, match="holds other tables"):
        open_store(f"sqlite:///{foreign}")
    with sqlite3.connect(foreign) as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["experiments"]
    (tmp_path / "text.db").write_text("not a database, but long enough to hold a header of one hundred bytes" * 3)
    with pytest.raises(ValueError, match="not an SQLite database"):
        open_store(f"sqlite:///{tmp_path}/text.db")


@pytest.mark.parametrize(
    "url, message",
    [
        ("nonsense", "expected sqlite:///PATH"),
        ("mysql://host/db", "expected sqlite or postgresql"),
        ("sqlite:///relative.db", "no absolute file"),
        ("sqlite:///:memory:", "no absolute file"),
        ("sqlite:////dev/null/store.db", "cannot be made"),
    ],
)
def test_unusable_urls_are_refused(url, message):
    with pytest.raises(ValueError, match=message):
        open_store(url)


def test_a_reader_does_not_create_a_store_at_a_mistyped_path(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_store(f"sqlite:///{tmp_path}/typo/store.db", create=False)
    assert not (tmp_path / "typo").exists()


def test_the_schema_is_valid_for_postgresql():
    ddl = [str(sql.schema.CreateTable(table).compile(dialect=postgresql.dialect())) for table in schema.sorted_tables]
    assert any("received_at BIGINT NOT NULL" in text for text in ddl)
    assert any("id BIGSERIAL NOT NULL" in text for text in ddl)
