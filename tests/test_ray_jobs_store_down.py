"""A store that is down, locked or full ends a job with one line and exit status 2, whatever the job was doing."""

from __future__ import annotations

import importlib
import resource
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ray_jobs.job import JobConfig, run_job
from store.api_keys import create_api_key
from store.database import StoreUnavailableError, open_store
from tests.house import REPO_ROOT, model_of


def ended(verb: str, model: type, run, arguments: list[str], monkeypatch, capsys) -> str:
    """Runs a job as `python -m` does; the only line that it leaves, of its own, on stderr."""
    monkeypatch.setattr("sys.argv", [verb, *arguments])
    with pytest.raises(SystemExit) as exit_status:
        run_job(verb, model, run)
    assert exit_status.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "Traceback" not in streams.err
    (line,) = [line for line in streams.err.splitlines() if line.startswith(f"{verb}: error: ")]
    assert streams.err.splitlines()[-1] == line
    return line


JOBS = {
    "manage_api_keys": [],
    "verify_audit": [],
    "upgrade_store": [],
    "promote_model": ["--approver", "Ada"],
}


@pytest.mark.parametrize("verb", JOBS)
def test_a_database_that_is_down(verb, tmp_path, monkeypatch, capsys):
    arguments = [*JOBS[verb], "--store-url", f"postgresql://dermray:pass-word@/x?host={tmp_path}"]
    run = importlib.import_module(f"ray_jobs.{verb}").run
    line = ended(verb, model_of(verb), run, arguments, monkeypatch, capsys)
    assert "cannot be opened: connection" in line and "pass-word" not in line


def test_a_database_that_goes_while_a_job_runs(monkeypatch, capsys):
    def run(_):
        raise StoreUnavailableError("store x cannot be read:\nserver closed the connection")

    line = ended("probe", JobConfig, run, [], monkeypatch, capsys)
    assert line == "probe: error: store x cannot be read: server closed the connection"


@pytest.fixture
def store_url(tmp_path) -> str:
    url = f"sqlite:///{tmp_path}/store.db"
    store = open_store(url)
    create_api_key(store, "clinic", "caller", "Ada")
    store.close()
    return url


@pytest.mark.parametrize("verb", ["manage_api_keys", "promote_model"])
def test_a_store_that_is_locked_beyond_the_busy_timeout(verb, store_url, monkeypatch, capsys):
    monkeypatch.setattr("store.connection.BUSY_TIMEOUT_MS", 50)
    run = importlib.import_module(f"ray_jobs.{verb}").run
    with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        line = ended(verb, model_of(verb), run, [*JOBS[verb], "--store-url", store_url], monkeypatch, capsys)
    assert "database is locked" in line


def test_the_trail_of_a_store_that_is_written_to_is_verified(store_url, tmp_path, monkeypatch):
    verify_audit = importlib.import_module("ray_jobs.verify_audit")
    with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert verify_audit.run(verify_audit.VerifyAuditConfig(store_url=store_url))["length"] == 1


def full_disk(size: int):
    """Every file that grows beyond `size` bytes fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def job(verb: str, *arguments: str, limit: int, home: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{verb}", *arguments],
        cwd=REPO_ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "DERMRAY_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=full_disk(limit),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_disk_that_is_full_when_a_key_is_made(store_url, dermray_home):
    size = Path(store_url.removeprefix("sqlite:///")).stat().st_size
    arguments = ["--store-url", store_url, "--action", "create", "--name", "n", "--role", "caller", "--actor", "Ada"]
    # The write-ahead log cannot take a single page.
    done = job("manage_api_keys", *arguments, limit=1024, home=dermray_home)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("manage_api_keys: error: ") and ("disk" in line or "full" in line)
    assert Path(store_url.removeprefix("sqlite:///")).stat().st_size == size
    store = open_store(store_url)
    assert len(store.audit_entries()) == 1
    store.close()


def test_a_disk_that_is_full_when_an_anchor_is_added(store_url, dermray_home):
    anchors = dermray_home / "audit_anchors.jsonl"
    assert job("verify_audit", "--store-url", store_url, limit=2**30, home=dermray_home).returncode == 0
    # More than SQLite's own files beside the store need.
    whole = anchors.read_bytes() * 500
    anchors.write_bytes(whole)
    done = job("verify_audit", "--store-url", store_url, limit=len(whole) + 20, home=dermray_home)
    assert (done.returncode, done.stdout) == (2, "")
    assert "audit_anchors.jsonl' cannot be written" in done.stderr.splitlines()[-1]
    assert anchors.read_bytes().startswith(whole)
    assert job("verify_audit", "--store-url", store_url, limit=2**30, home=dermray_home).returncode == 0
    assert len(anchors.read_bytes().splitlines()) == 501
