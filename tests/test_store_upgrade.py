"""A store of an older release opens: what it lacks is made, what it holds stays."""

from __future__ import annotations

import sqlite3
import threading

import pytest
import sqlalchemy as sql

from store import audit_chain
from store.candidates import list_candidates, record_candidate
from store.database import look_at_store, open_store
from store.tables import SCHEMA_VERSION, candidates, schema, schema_version
from tests.house import REPO_ROOT


def indexes(store) -> set[str]:
    inspector = sql.inspect(store.engine)
    return {index["name"] for table in inspector.get_table_names() for index in inspector.get_indexes(table)}


def versions(store) -> list[int]:
    with store.reading() as connection:
        return sorted(connection.execute(sql.select(schema_version.c.version)).scalars())


def check_upgraded(store) -> None:
    assert versions(store) == [1, SCHEMA_VERSION]
    assert set(sql.inspect(store.engine).get_table_names()) == set(schema.tables)
    assert {index.name for table in schema.sorted_tables for index in table.indexes} <= indexes(store)
    assert record_candidate(store, "7", "d" * 64, {"none": {}}) is True
    assert [row["model_version"] for row in list_candidates(store, 10)] == ["7"]


@pytest.fixture
def version_1(tmp_path):
    """A store that the first release made, with one approval."""
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.executescript((REPO_ROOT / "tests" / "store_version_1.sql").read_text())
    return f"sqlite:///{tmp_path}/store.db"


def test_a_store_of_version_1_is_brought_up_to_date_and_keeps_what_it_holds(version_1):
    store = open_store(version_1)
    check_upgraded(store)
    (approval,) = store.approvals()
    assert (approval["approver"], approval["reason"]) == ("Ada", "first")
    assert audit_chain.verify(store.audit_entries()) == 1
    store.close()
    again = open_store(version_1, create=False)
    assert versions(again) == [1, SCHEMA_VERSION]
    again.close()


def test_many_that_open_an_old_store_at_once_upgrade_it_once(version_1):
    errors, start = [], threading.Barrier(6)

    def open_it() -> None:
        start.wait()
        try:
            open_store(version_1).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    store = open_store(version_1)
    check_upgraded(store)
    store.close()


def test_an_index_that_an_old_store_lacks_is_made(version_1, tmp_path):
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.execute("DROP INDEX ix_predictions_patient_hmac")
    store = open_store(version_1)
    assert "ix_predictions_patient_hmac" in indexes(store)
    store.close()


def test_an_upgrade_that_fails_leaves_the_old_store(version_1, monkeypatch):
    def fail(connection, **_):
        candidates.create(connection)
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "create_all", fail)
        with pytest.raises(RuntimeError):
            open_store(version_1)
    with sqlite3.connect(version_1.removeprefix("sqlite:///")) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert "candidates" not in tables
    store = open_store(version_1)
    check_upgraded(store)
    store.close()


def test_a_look_at_an_old_store_leaves_it_as_it_is(version_1):
    store, version = look_at_store(version_1)
    assert version == 1 and versions(store) == [1] and len(store.approvals()) == 1
    assert "candidates" not in sql.inspect(store.engine).get_table_names()
    store.close()
    open_store(version_1).close()
    store, version = look_at_store(version_1)
    assert version == SCHEMA_VERSION
    store.close()


@pytest.mark.postgres
def test_a_look_at_a_database_without_a_store_makes_none(postgres_url):
    assert look_at_store(postgres_url) is None
    open_store(postgres_url).close()
    store, version = look_at_store(postgres_url)
    assert version == SCHEMA_VERSION and store.audit_entries() == []
    store.close()


@pytest.mark.postgres
def test_an_old_store_on_postgresql_is_brought_up_to_date(postgres_url):
    store = open_store(postgres_url)
    with store.writing() as connection:
        connection.execute(sql.text("DROP TABLE candidates"))
        connection.execute(sql.text("DROP INDEX ix_predictions_patient_hmac"))
        connection.execute(sql.update(schema_version).values(version=1))
    store.close()
    store = open_store(postgres_url)
    check_upgraded(store)
    store.close()
