"""Connects to SQLite or PostgreSQL and makes sure that the schema is there, whoever comes first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine, make_url

from store.tables import SCHEMA_VERSION, schema, schema_version

# How long a writer waits for SQLite's one write lock: many times what the longest of our transactions takes, and half
# of what a request may take, so that a route still answers 503 itself.
BUSY_TIMEOUT_MS = 15_000
# The same for a statement on PostgreSQL, where it counts the wait for another's lock too.
STATEMENT_TIMEOUT_MS = BUSY_TIMEOUT_MS
# An upgrade builds indexes on tables of any size.
_UPGRADE_TIMEOUT_MS = 600_000
_UPGRADE_LOCK_TIMEOUT_MS = 10_000
# How long a thread waits for a connection that others of its process hold; there are as many as a replica has threads
# that use the store, so only calls that hang take them all.
_POOL_TIMEOUT_S = 5
# What libpq is told, where the URL does not say otherwise. PgBouncer wants `options` among its
# `ignore_startup_parameters`, or another `options` in the URL.
_POSTGRESQL: Mapping[str, Any] = {
    # A lost SYN is sent again after 1 and 3 s. It also ends the wait for a server that accepts and does not answer.
    "connect_timeout": 5,
    # A server that is gone without a word is noticed after 10 + 3 * 5 s of silence (by default, after two hours), and
    # after 15 s where something that was sent to it is not acknowledged.
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    # The second: a process that is stopped inside a transaction would keep its locks, an erasure's stops all commits.
    "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c idle_in_transaction_session_timeout=60000",
}
# Any fixed number: the key under which PostgreSQL serialises schema creation and the audit chain.
ADVISORY_LOCK = 0x6465726D


def connect(url: str, create: bool = True, upgrade: bool = False) -> Engine:
    """An engine on a store whose schema is the one of this code: created where the database is empty.

    Args:
        create: False: an SQLite file that is not there is an error.
        upgrade: True: a store of an older release is brought up to date; else it is an error.

    Raises:
        ValueError: not a store URL, a folder that cannot be made, a file that is no SQLite database, a database of
            something else, or a store of another release.
        sqlalchemy.exc.DBAPIError: the database does not answer.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return _connect_sqlite(parsed, url, create, upgrade)
    engine = _postgresql_engine(parsed)
    with _disposed_on_error(engine), engine.begin() as connection:
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        _create_or_check(connection, url, upgrade)
    return engine


def connect_as_found(url: str) -> tuple[Engine, int] | None:
    """An engine to read a store with, which is neither made nor brought up to date, and its schema version; None where
    no store was made yet.

    Raises:
        ValueError, sqlalchemy.exc.DBAPIError: where `connect` would raise.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        path = _sqlite_path(parsed, url)
        _check_writable(path, url)
        if not path.exists():
            return None
        # Without the listeners of `connect`, which turn a file to WAL.
        engine = sql.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
        refusal = _no_database(path)
    else:
        engine, refusal = _postgresql_engine(parsed), nullcontext()
    with _disposed_on_error(engine), refusal, engine.connect() as connection:
        version = _find_version(connection, url)
    if version is None:
        engine.dispose()
        return None
    return engine, version


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        raise ValueError(f"store_url is {url!r}; expected sqlite:///PATH or postgresql+psycopg://...") from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise ValueError(f"store_url {url!r} names {backend}; expected sqlite or postgresql")
    return parsed


def _postgresql_engine(parsed: URL) -> Engine:
    return sql.create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        connect_args={name: value for name, value in _POSTGRESQL.items() if name not in parsed.query},
        pool_timeout=_POOL_TIMEOUT_S,
        pool_pre_ping=True,
        # Without it an INSERT reports -1 rows, and no caller learns whether its row was new.
        execution_options={"preserve_rowcount": True},
    )


def _sqlite_path(parsed: URL, url: str) -> Path:
    if not parsed.database or parsed.database == ":memory:" or not os.path.isabs(parsed.database):
        raise ValueError(f"store_url {url!r} names no absolute file; expected sqlite:////absolute/path.db")
    return Path(parsed.database)


def _check_writable(path: Path, url: str) -> None:
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"store_url {url!r}: folder {path.parent} cannot be made: {folder} is no folder")
    for place in (folder, path) if path.exists() else (folder,):
        if not os.access(place, os.W_OK):
            raise ValueError(f"store_url {url!r}: {place} cannot be written")


@contextmanager
def _no_database(path: Path) -> Iterator[None]:
    try:
        yield
    except exc.DatabaseError as error:
        if "not a database" in str(error.orig):
            raise ValueError(f"store {path} is not an SQLite database") from error
        raise


def _connect_sqlite(parsed: URL, url: str, create: bool, upgrade: bool) -> Engine:
    path = _sqlite_path(parsed, url)
    if not create and not path.exists():
        raise ValueError(f"store {path} does not exist; the service makes it, or check store_url")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"store_url {url!r}: folder {path.parent} cannot be made: {error.strerror}") from error
    engine = sql.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, pool_timeout=_POOL_TIMEOUT_S)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    # The switch to WAL does not always wait for the busy timeout (1 of 360 first openers met "database is locked"), so
    # openers go one by one.
    with _disposed_on_error(engine), _file_lock(path.with_name(path.name + ".lock")), _no_database(path):
        with engine.execution_options(dermray_write=True).begin() as connection:
            _create_or_check(connection, url, upgrade)
    return engine


@contextmanager
def _disposed_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"store folder {path.parent} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _configure_sqlite(connection, _record) -> None:
    # Python's own implicit BEGIN leaves DDL outside the transaction; `_begin_sqlite` begins instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        # Deleted rows are overwritten with zeros: an erased patient must not be readable in the file's free pages.
        cursor.execute("PRAGMA secure_delete = ON")
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("dermray_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _create_or_check(connection: Connection, url: str, upgrade: bool) -> None:
    found = _find_version(connection, url)
    if found == SCHEMA_VERSION:
        return
    if found is not None and not upgrade:
        raise ValueError(
            f"store {_shown(url)} has schema version {found}; this release reads version {SCHEMA_VERSION}: upgrade it "
            "with python -m ray_jobs.upgrade_store --store-url URL, or by deploying this release"
        )
    # Only here: most processes find a store that is up to date.
    from store import schema_upgrade

    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_UPGRADE_TIMEOUT_MS}")
        # Whoever waits to change a table holds up all who come to read it after.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_UPGRADE_LOCK_TIMEOUT_MS}")
    if found is None:
        schema.create_all(connection)
        schema_upgrade.mark_new(connection)
    else:
        schema_upgrade.upgrade(connection, found)
    # Beside alembic's table, which releases before version 4 do not know: by this one they refuse the store.
    connection.execute(sql.insert(schema_version).values(version=SCHEMA_VERSION))


def _find_version(connection: Connection, url: str) -> int | None:
    """The schema version of a store that this release can use; None where the database is empty."""
    existing = set(sql.inspect(connection).get_table_names())
    if not existing:
        return None
    name = _shown(url)
    if schema_version.name not in existing:
        raise ValueError(f"store {name} holds other tables ({', '.join(sorted(existing)[:3])}, ...); expected a store")
    found = connection.execute(sql.select(sql.func.max(schema_version.c.version))).scalar()
    if found is None or found > SCHEMA_VERSION:
        raise ValueError(f"store {name} has schema version {found}; this release reads version {SCHEMA_VERSION}")
    return found


def _shown(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)
