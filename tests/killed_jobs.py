"""Runs jobs in processes that are killed just before one of their durable steps, and again to the end.

A durable step is a commit to any database, or a file or folder that is renamed into place or removed: killed between
two of them, a job leaves what it leaves when it is killed just before the second.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from store.database import Store, open_store
from store.tables import schema

FILE_STEPS = ("replace", "rename", "unlink", "remove", "rmdir")
# Other in every run: when something was done, and what a database numbers.
VOLATILE = frozenset(
    {"created_at", "raised_at", "decided_at", "requested_at", "finished_at", "at", "deleted_at", "erased_at"}
    | {"labelled_at", "stored_at", "hash", "previous_hash"}
)


def _count_steps(kill_before: int) -> Callable[[], int]:
    """Kills this process before its n-th durable step; 0: never. Returns what tells how many there were."""
    numbers = itertools.count(1)
    seen = [0]

    def step(*_: Any) -> None:
        seen[0] = next(numbers)
        if seen[0] == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            return whole(*arguments, **options)

        return call

    for name in FILE_STEPS:
        setattr(os, name, counted(getattr(os, name)))
    sql.event.listen(sql.engine.Engine, "commit", step)
    return lambda: seen[0]


def _run(verb: str, config: dict[str, Any], kill_before: int, answers: Any) -> None:
    job = importlib.import_module(f"ray_jobs.{verb}")
    model = next(value for name, value in vars(job).items() if name.lower() == verb.replace("_", "") + "config")
    steps = _count_steps(kill_before)
    try:
        result = job.run(model(**config))
    except ValueError as error:
        result = f"refused: {error}"
    answers.send((result, steps()))


class Job:
    """One verb with its config, run in processes that start with everything heavy imported."""

    def __init__(self, verb: str, config: Mapping[str, Any], preload: tuple[str, ...] = ()):
        self.verb, self.config = verb, dict(config)
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

    def kill_before(self, step: int) -> bool:
        """Runs until just before the n-th durable step; False where it ended before."""
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._start(step, sending)
        sending.close()
        process.join()
        receiving.close()
        return process.exitcode == -signal.SIGKILL

    def _start(self, kill_before: int, sending: Any) -> Any:
        process = self._context.Process(target=_run, args=(self.verb, self.config, kill_before, sending))
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


def check_every_kill(job: Job, home: Home, state: Callable[[], Any], max_points: int = 60) -> int:
    """Asserts that a run that was killed before any of its durable steps, and was run again, ends as one that was not,
    and that yet another run changes nothing; returns the number of steps.

    Args:
        state: what is to be the same, without what is other in every run.
        max_points: of more steps than these, evenly spread ones are tried.
    """
    home.restore()
    result, steps = job.run()
    expected = state()
    assert steps > 0, f"{job.verb} wrote nothing: {result}"
    job.run()
    assert state() == expected, f"{job.verb} run twice is not {job.verb} run once"
    points = (
        range(1, steps + 1) if steps <= max_points else sorted({1 + i * steps // max_points for i in range(max_points)})
    )
    for point in points:
        home.restore()
        assert job.kill_before(point), f"{job.verb} took fewer than {point} steps of {steps}"
        job.run()
        assert state() == expected, f"killed before step {point} of {steps}"
    return steps


def rows(store_url: str, *leave_out: str) -> dict[str, list[str]]:
    """Every table's rows as text, sorted, without what is other in every run and without the columns `leave_out`."""
    store: Store = open_store(store_url)
    found = {}
    with store.reading() as connection:
        for table in schema.sorted_tables:
            columns = [column for column in table.c if column.name not in VOLATILE | set(leave_out)]
            found[table.name] = sorted(map(str, connection.execute(sql.select(*columns)).all()))
    store.close()
    return found


def files(folder: Path, contents: bool = True) -> dict[str, str]:
    """Every file below a folder with its SHA-256 (or nothing)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if contents else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
