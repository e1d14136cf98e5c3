"""A store of an older release is brought up to date on request: it gets the schema of a new one and keeps its rows."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from store import audit_chain, connection, schema_upgrade
from store.api_keys import list_api_keys
from store.candidates import list_candidates, record_candidate
from store.database import StoreUnavailableError, look_at_store, open_store
from store.tables import SCHEMA_VERSION, schema, schema_version
from tests.house import REPO_ROOT
from tests.old_stores import ROWS, all_rows, make_version_1, make_version_3, plain_engine, run_script

OLD = {1: make_version_1, 3: make_version_3}


@pytest.fixture
def version_1(any_store_url) -> str:
    make_version_1(any_store_url)
    return any_store_url


@pytest.fixture
def sqlite_version_1(tmp_path) -> str:
    url = f"sqlite:///{tmp_path}/store.db"
    make_version_1(url)
    return url


def described(url: str) -> dict:
    """Everything that the database says of the schema."""
    engine = plain_engine(url)
    found = sql.inspect(engine)

    def columns(table: str) -> dict:
        return {
            column["name"]: (str(column["type"]), column["nullable"], column["default"], column.get("autoincrement"))
            for column in found.get_columns(table)
        }

    def by_name(parts: list[dict]) -> dict:
        return {part["name"]: (part["column_names"], part.get("unique")) for part in parts}

    schema_found = {
        table: {
            "columns": columns(table),
            "primary key": found.get_pk_constraint(table),
            "indexes": by_name(found.get_indexes(table)),
            "unique": by_name(found.get_unique_constraints(table)),
        }
        for table in found.get_table_names()
    }
    engine.dispose()
    return schema_found


def differences(url: str, expected: sql.MetaData = schema) -> list:
    """What alembic would change in the database to get the tables of this release."""
    engine = plain_engine(url)
    with engine.connect() as reader:
        context = MigrationContext.configure(reader, opts={"compare_type": True, "compare_server_default": True})
        found = compare_metadata(context, expected)
    engine.dispose()
    return found


def versions(url: str) -> tuple[list[int], list[str]]:
    """What the store says of its version: to every release, and to alembic."""
    engine = plain_engine(url)
    with engine.connect() as reader:
        ours = sorted(reader.execute(sql.select(schema_version.c.version)).scalars())
        named = MigrationContext.configure(reader).get_current_heads()
    engine.dispose()
    return ours, list(named)


NEWEST = [f"{SCHEMA_VERSION:04d}"]


@pytest.mark.parametrize("old", OLD)
def test_an_upgraded_store_has_the_schema_of_a_new_one(any_store_url, old, tmp_path, request):
    OLD[old](any_store_url)
    assert differences(any_store_url) != []
    open_store(any_store_url, upgrade=True).close()
    assert differences(any_store_url) == []
    upgraded = described(any_store_url)
    assert set(upgraded) == {*schema.tables, "alembic_version"}
    if any_store_url.startswith("sqlite"):
        new = f"sqlite:///{tmp_path}/new.db"
        open_store(new).close()
    else:
        new = any_store_url
        run_script(new, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        open_store(new).close()
    assert upgraded == described(new)


def test_a_change_of_the_tables_without_a_migration_is_noticed(version_1):
    open_store(version_1, upgrade=True).close()
    changes = {
        "column": lambda tables: tables["labels"].append_column(sql.Column("site", sql.String(8))),
        "table": lambda tables: sql.Table("notes", tables["labels"].metadata, sql.Column("id", sql.Integer)),
        "index": lambda tables: sql.Index("ix_labels_label", tables["labels"].c.label),
        "length": lambda tables: setattr(tables["labels"].c.label, "type", sql.String(32)),
        "nullable": lambda tables: setattr(tables["labels"].c.label, "nullable", True),
    }
    for name, change in changes.items():
        changed = sql.MetaData(naming_convention=schema.naming_convention)
        for table in schema.sorted_tables:
            table.to_metadata(changed)
        assert differences(version_1, changed) == []
        change(changed.tables)
        assert differences(version_1, changed) != [], name


def test_the_newest_revision_is_the_version_that_the_release_reads():
    steps = schema_upgrade.migrations_after(1)
    assert [step.version for step in steps] == list(range(2, SCHEMA_VERSION + 1))
    assert all(step.summary for step in steps)


@pytest.mark.parametrize("old", OLD)
def test_an_upgrade_keeps_every_row(any_store_url, old):
    OLD[old](any_store_url)
    engine = plain_engine(any_store_url)
    before = all_rows(engine)
    assert {name for name, rows in before.items() if rows} == set(before)
    columns = {name: list(found["columns"]) for name, found in described(any_store_url).items()}
    store = open_store(any_store_url, upgrade=True)
    after = all_rows(engine, columns)
    engine.dispose()
    assert after.pop("schema_version") == [*before.pop("schema_version"), (SCHEMA_VERSION,)]
    assert after == before
    with store.reading() as reader:
        label = reader.execute(sql.select(schema.tables["labels"])).mappings().one()
    assert (label["source"], label["external_id"], label["adjudication"]) == ("api", None, False)
    assert audit_chain.verify(store.audit_entries()) == 1
    # Not an id that an old row has.
    assert store.record_approval("2", "Ada", "better") == 2
    assert record_candidate(store, "8", "d" * 64, {"none": {}}) is True
    assert "8" in [row["model_version"] for row in list_candidates(store, 10)]
    store.close()
    open_store(any_store_url, create=False).close()
    assert versions(any_store_url) == ([1, *([3] if old == 3 else []), SCHEMA_VERSION], NEWEST)


def test_a_new_store_is_of_the_newest_revision(any_store_url):
    open_store(any_store_url).close()
    assert versions(any_store_url) == ([SCHEMA_VERSION], NEWEST)
    assert differences(any_store_url) == []


def test_who_opens_an_old_store_is_told_how_to_upgrade_it(version_1):
    before = described(version_1)
    with pytest.raises(
        ValueError, match="schema version 1; this release reads version .*ray_jobs.upgrade_store"
    ) as told:
        open_store(version_1)
    assert "\n" not in str(told.value)
    assert described(version_1) == before


def test_replicas_of_the_release_before_go_on_with_an_upgraded_store(any_store_url):
    make_version_3(any_store_url)
    engine = plain_engine(any_store_url)
    theirs = sql.MetaData()
    theirs.reflect(engine)
    open_store(any_store_url, upgrade=True).close()
    with engine.begin() as writer:
        for name in ("labels", "alarms", "retrain_requests"):
            row = {**ROWS[name], **({"dedupe_key": "next"} if "dedupe_key" in ROWS[name] else {})}
            row = {**row, **({"id": "t2"} if "id" in row else {})}
            writer.execute(sql.insert(theirs.tables[name]).values(row))
            assert len(writer.execute(sql.select(theirs.tables[name])).all()) == 2
    engine.dispose()


def test_many_that_upgrade_at_once_upgrade_once(version_1):
    errors, start = [], threading.Barrier(6)

    def open_it() -> None:
        start.wait()
        try:
            open_store(version_1, upgrade=True).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert versions(version_1) == ([1, SCHEMA_VERSION], NEWEST)
    assert differences(version_1) == []


def test_stores_that_are_upgraded_at_once_in_one_process_do_not_mix(tmp_path):
    urls = [f"sqlite:///{tmp_path}/store-{number}.db" for number in range(4)]
    for url in urls:
        make_version_1(url)
    errors, start = [], threading.Barrier(len(urls))

    def upgrade(url: str) -> None:
        start.wait()
        try:
            open_store(url, upgrade=True).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=upgrade, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert [differences(url) for url in urls] == [[]] * len(urls)


def test_indexes_that_some_old_stores_had_are_no_hindrance(version_1):
    run_script(version_1, "CREATE INDEX ix_audit_subject ON audit (subject)")
    open_store(version_1, upgrade=True).close()
    assert differences(version_1) == []


@pytest.mark.parametrize("step", range(2, SCHEMA_VERSION + 1))
def test_an_upgrade_that_fails_leaves_the_old_store(version_1, step, monkeypatch):
    before, rows = described(version_1), all_rows(plain_engine(version_1))
    steps = schema_upgrade._steps

    def one_fails(directory, version):
        found = steps(directory, version)
        run = found[step - 2].module.upgrade

        def fail() -> None:
            run()
            raise RuntimeError("power cut")

        found[step - 2].module.upgrade = fail
        return found

    with monkeypatch.context() as patch:
        patch.setattr(schema_upgrade, "_steps", one_fails)
        with pytest.raises(RuntimeError, match="power cut"):
            open_store(version_1, upgrade=True)
    assert described(version_1) == before and all_rows(plain_engine(version_1)) == rows
    open_store(version_1, upgrade=True).close()
    assert differences(version_1) == []


KILLED = """
import os, sys
from store import schema_upgrade
from store.database import open_store
stamp = schema_upgrade.MigrationContext.stamp
def cut(*arguments):
    stamp(*arguments)
    os._exit(9)
schema_upgrade.MigrationContext.stamp = cut
open_store(sys.argv[1], upgrade=True)
"""


def test_an_upgrade_that_is_killed_leaves_the_old_store(version_1):
    before = described(version_1)
    done = subprocess.run([sys.executable, "-c", KILLED, version_1], cwd=REPO_ROOT, timeout=60, check=False)
    assert done.returncode == 9
    assert described(version_1) == before
    open_store(version_1, upgrade=True).close()
    assert differences(version_1) == []


@pytest.mark.postgres
def test_an_upgrade_does_not_hold_up_readers_behind_a_long_transaction(postgres_url, monkeypatch):
    make_version_1(postgres_url)
    monkeypatch.setattr(connection, "_UPGRADE_LOCK_TIMEOUT_MS", 100)
    engine = plain_engine(postgres_url)
    with engine.connect() as reader:
        reader.execute(sql.text("SELECT * FROM labels"))
        with pytest.raises(StoreUnavailableError, match="lock timeout"):
            open_store(postgres_url, upgrade=True)
    engine.dispose()
    assert versions(postgres_url) == ([1], [])
    open_store(postgres_url, upgrade=True).close()


def test_a_store_whose_two_versions_contradict_is_refused(version_1):
    run_script(
        version_1, "CREATE TABLE alembic_version (version_num VARCHAR(32)); INSERT INTO alembic_version VALUES ('0003')"
    )
    with pytest.raises(ValueError, match="schema version 1 in schema_version, but 0003 in alembic_version"):
        open_store(version_1, upgrade=True)
    assert versions(version_1) == ([1], ["0003"])


def test_a_store_of_a_later_release_is_refused_whoever_asks(version_1):
    run_script(version_1, f"INSERT INTO schema_version VALUES ({SCHEMA_VERSION + 1})")
    for ask in (open_store, lambda url: open_store(url, upgrade=True), look_at_store):
        with pytest.raises(
            ValueError, match=f"version {SCHEMA_VERSION + 1}; this release reads version {SCHEMA_VERSION}"
        ):
            ask(version_1)


def test_a_look_at_an_old_store_leaves_it_as_it_is(version_1):
    before = described(version_1)
    store, version = look_at_store(version_1)
    assert version == 1 and len(store.approvals()) == 1 and len(list_api_keys(store)) == 1
    store.close()
    assert described(version_1) == before
    open_store(version_1, upgrade=True).close()
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


def test_alembic_is_not_loaded_for_a_store_that_is_up_to_date(tmp_path):
    url = f"sqlite:///{tmp_path}/store.db"
    open_store(url).close()
    code = "import sys; from store.database import open_store; open_store(sys.argv[1]); print('alembic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, url], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_an_upgrade_leaves_logging_alone(sqlite_version_1):
    names = [None, "alembic", "sqlalchemy", "sqlalchemy.engine"]
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]
    disabled = logging.getLogger("dermray").disabled
    open_store(sqlite_version_1, upgrade=True).close()
    assert [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names] == before
    assert logging.getLogger("dermray").disabled == disabled


def test_erased_rows_are_overwritten_in_an_upgraded_store_too(sqlite_version_1):
    store = open_store(sqlite_version_1, upgrade=True)
    with store.writing() as writer:
        assert writer.exec_driver_sql("PRAGMA secure_delete").scalar() == 1
        assert writer.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        writer.exec_driver_sql("DELETE FROM labels")
    store.close()
    assert b"Dr Weber" not in Path(sqlite_version_1.removeprefix("sqlite:///")).read_bytes()
