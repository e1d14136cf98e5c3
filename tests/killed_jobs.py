"""Runs jobs in processes that are killed at one of their durable steps, and again to the end.

Steps are seen by Python's audit events, whoever makes them and in whatever thread, and by SQLAlchemy's commits:

- a file or folder below the job's home that is renamed, linked, truncated or removed: killed just before it;
- a file there that is opened for writing: killed just after, when it is made or emptied and nothing is in it;
- a file's `fsync`, when its bytes are written and nobody was told: killed just before it;
- a commit to any database: killed just before it.

Between two of these a job leaves what it leaves at the second. Not seen: what C libraries write by themselves (HDF5,
SQLite, Parquet's own files: each of ours is renamed into place), half a `write` (a torn line: see the tests of the
files that are appended to), and processes that a job starts; none of the jobs here starts one. SIGKILL takes a process,
not the machine: whether what was synced survives a power cut is no question of these tests.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from store.database import Store, open_store
from store.tables import schema

# Audit event -> the places of a path and of the descriptor of the folder that it is relative to.
_BEFORE = {"os.rename": (0, 2), "os.link": (0, 2), "os.symlink": (1, 2), "os.remove": (0, 1), "os.rmdir": (0, 1)}
_BEFORE |= {"os.truncate": (0, None)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Other in every run: when something was done, and what a database numbers.
VOLATILE = frozenset(
    {"created_at", "raised_at", "decided_at", "requested_at", "finished_at", "at", "deleted_at", "erased_at"}
    | {"labelled_at", "stored_at", "recorded_at", "hash", "previous_hash", "leased_until", "attempt", "next_attempt_at"}
)


def _path(path: Any, folder: Any = None) -> str:
    """Where a path of an audit event leads."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
    return os.path.abspath(os.path.join(base, os.fsdecode(path)))


def _count_steps(kill_at: int, home: str) -> Callable[[], int]:
    """Kills this process at its n-th durable step; 0: never. Returns what tells how many there were."""
    numbers = itertools.count(1)
    seen = [0]

    def step(leave: Callable[[], Any] = lambda: None) -> None:
        number = seen[0] = next(numbers)
        if number == kill_at:
            leave()
            os.kill(os.getpid(), signal.SIGKILL)

    def at_home(path: Any, folder: Any = None) -> bool:
        return _path(path, folder).startswith(home + "/")

    def look(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            # The call itself comes next: killed here, its file is made as the call would.
            if flags & _WRITING and not isinstance(path, int) and at_home(path):
                step(lambda: os.close(os.open(path, flags, 0o600)))
        elif event in _BEFORE:
            place, folder = _BEFORE[event]
            if at_home(arguments[place], None if folder is None else arguments[folder]):
                step()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and at_home(descriptor):
            step()
        fsync(descriptor)

    sys.addaudithook(look)
    os.fsync = counted
    sql.event.listen(sql.engine.Engine, "commit", lambda _: step())
    return lambda: seen[0]


def _run(
    verb: str, config: dict[str, Any], home: str, kill_at: int, stand_in: Callable[[], None] | None, answers: Any
) -> None:
    job = importlib.import_module(f"ray_jobs.{verb}")
    model = next(value for name, value in vars(job).items() if name.lower() == verb.replace("_", "") + "config")
    if stand_in is not None:
        stand_in()
    steps = _count_steps(kill_at, home)
    try:
        result = job.run(model(**config))
    except ValueError as error:
        result = f"refused: {error}"
    answers.send((result, steps()))


class Job:
    """One verb with its config, run in processes that start with everything heavy imported.

    Args:
        home: folder of all that the job writes.
        preload: modules, imported once for all; those of the first job of a test run alone.
        stand_in: called in each process before the job; a function of a module.
    """

    def __init__(
        self,
        verb: str,
        config: Mapping[str, Any],
        home: Path,
        preload: tuple[str, ...] = (),
        stand_in: Callable[[], None] | None = None,
    ):
        self.verb, self.config = verb, dict(config)
        self._home, self._stand_in = str(home.resolve()), stand_in
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.killed_jobs", f"ray_jobs.{verb}", *preload])

    def run(self) -> tuple[Any, int]:
        """The result of a whole run, or the line that refuses it, and how many durable steps it took."""
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._start(0, sending)
        sending.close()
        try:
            answer = receiving.recv()
        except EOFError:
            process.join()
            raise AssertionError(f"{self.verb} ended with {process.exitcode} and no result") from None
        process.join()
        return answer

    def kill_at(self, step: int) -> bool:
        """Runs until the n-th durable step; False where it ended before."""
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._start(step, sending)
        sending.close()
        process.join()
        receiving.close()
        return process.exitcode == -signal.SIGKILL

    def _start(self, kill_at: int, sending: Any) -> Any:
        arguments = (self.verb, self.config, self._home, kill_at, self._stand_in, sending)
        process = self._context.Process(target=_run, args=arguments)
        process.start()
        return process


class Home:
    """A folder that is put back to what it was, in place: registries hold absolute paths."""

    def __init__(self, folder: Path, kept: Path):
        self.folder, self._kept = folder, kept
        shutil.copytree(folder, kept)

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._kept, self.folder)


def check_every_kill(
    job: Job,
    home: Home,
    state: Callable[[], Any],
    max_points: int = 60,
    after_kill: Callable[[], None] = lambda: None,
) -> int:
    """Asserts that a run that was killed at any of its durable steps, and was run again, ends as one that was not, and
    that yet another run changes nothing; returns the number of steps.

    Args:
        state: what is to be the same, without what is other in every run.
        max_points: of more steps than these, evenly spread ones are tried.
        after_kill: what passes before the next run, as time does.
    """
    home.restore()
    result, steps = job.run()
    expected = state()
    assert steps > 0, f"{job.verb} wrote nothing: {result}"
    assert not str(result).startswith("refused"), result
    job.run()
    differs = "; ".join(_differences(expected, state()))
    assert not differs, f"{job.verb} run twice is not {job.verb} run once: {differs}"
    points = (
        range(1, steps + 1) if steps <= max_points else sorted({1 + i * steps // max_points for i in range(max_points)})
    )
    for point in points:
        home.restore()
        assert job.kill_at(point), f"{job.verb} took fewer than {point} steps of {steps}"
        after_kill()
        result, _ = job.run()
        differs = "; ".join(_differences(expected, state()))
        assert not differs, f"killed at step {point} of {steps}, then {str(result)[:300]}: {differs}"
    return steps


def _differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """What is other in one than in the other, by its place."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}, key=str):
            yield from _differences(expected.get(key), found.get(key), f"{where}/{key}")
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(one, other, f"{where}/{number}")
    elif expected != found:
        yield f"{where}: {str(found)[:2000]}, expected {str(expected)[:2000]}"


def rows(store_url: str, *leave_out: str) -> dict[str, list[str]]:
    """Every table's rows as text, sorted, without what is other in every run and without the columns `leave_out`."""
    store: Store = open_store(store_url)
    found = {}
    with store.reading() as connection:
        for table in schema.sorted_tables:
            columns = [column for column in table.c if column.name not in VOLATILE | set(leave_out)]
            found[table.name] = sorted(map(_text, connection.execute(sql.select(*columns))))
    store.close()
    return found


def _text(row: Any) -> str:
    """All of it: the text of SQLAlchemy's own rows leaves out the middle of long values. Objects have no order."""
    return str([json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for value in row])


def files(folder: Path, contents: bool = True) -> dict[str, str]:
    """Every file below a folder with its SHA-256 (or nothing)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if contents else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
