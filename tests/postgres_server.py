"""A PostgreSQL server of the tests' own, behind a Unix socket that no one else can open; ended with the run."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

_DEBIAN = Path("/usr/lib/postgresql")
_START_S = 60


def find_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`: Debian's newest version, else what is on PATH."""
    versions = [folder for folder in _DEBIAN.glob("*/bin") if (folder / "initdb").exists()]
    if versions:
        return max(versions, key=lambda folder: float(folder.parent.name))
    found = shutil.which("initdb")
    return None if found is None else Path(found).resolve().parent


def _unprivileged() -> dict[str, int | list[int]]:
    """Who runs the server: it refuses root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class PostgresServer:
    """One server in a folder directly below /tmp: its user cannot enter pytest's own folders, and a socket's path may
    have 107 characters."""

    def __init__(self, binaries: Path):
        self._binaries = binaries
        self._as_user = _unprivileged()
        self._folder = Path(tempfile.mkdtemp(prefix="dermray-pg-", dir="/tmp"))
        if self._as_user:
            os.chown(self._folder, self._as_user["user"], self._as_user["group"])
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns once the server answers."""
        data = self._folder / "data"
        subprocess.run(
            [self._binaries / "initdb", "-D", data, "-U", "dermray", "--auth=trust", "--no-sync", "--encoding=UTF8"],
            cwd=self._folder,
            check=True,
            capture_output=True,
            timeout=_START_S,
            **self._as_user,
        )
        self._launch()

    def _launch(self) -> None:
        # fsync: these rows need not outlive the machine, only the server.
        options = {"fsync": "off", "shared_buffers": "16MB", "listen_addresses": "", "max_connections": "60"}
        command = [self._binaries / "postgres", "-D", self._folder / "data", "-k", self._folder]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True, **self._as_user
            )
        subprocess.run(
            ["bash", "-c", 'until "$0" -q -h "$1"; do kill -0 "$2" || exit 1; sleep 0.1; done']
            + [str(self._binaries / "pg_isready"), str(self._folder), str(self._process.pid)],
            check=True,
            timeout=_START_S,
        )

    def kill(self) -> None:
        """Ends the server and all of its processes with SIGKILL; what they were about to write is lost."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def restart(self) -> None:
        """Starts the server again after `kill`; returns once it has recovered and answers."""
        self._launch()

    def stop(self) -> None:
        """Ends the server, whoever is still connected, and removes its files."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(30)
        shutil.rmtree(self._folder)

    def execute(self, statement: str) -> None:
        """Runs one statement outside a transaction."""
        with psycopg.connect(host=str(self._folder), user="dermray", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement)

    def url(self, database: str) -> str:
        return f"postgresql://dermray@/{database}?host={self._folder}"


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server until the block ends; skips the test where there is none."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server: Debian's package is `postgresql`")
    server = PostgresServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the whole run."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A store URL with an empty database of this test's own."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    postgres_server.execute(f"CREATE DATABASE {name}")
    yield postgres_server.url(name)
    postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def any_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store, once on each database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    return request.getfixturevalue("postgres_url")
