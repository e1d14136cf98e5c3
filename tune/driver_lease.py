"""One driver per search: who writes a search's folder, and when it was last seen. Two drivers would overwrite each
other's ledger and train the same folds."""

from __future__ import annotations

import os
import socket
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from tune.json_files import read_json, remove, write_json

# Four missed saves of the ledger. Another host can tell only by this whether a driver is gone.
LEASE_SECONDS = 60.0


class SearchTakenOverError(RuntimeError):
    """Another driver writes this search now."""


@cache
def _driver_id(pid: int) -> str:
    return uuid.uuid4().hex


def driver_id() -> str:
    """This process's id. Never part of what is pickled: Ray Tune brings a pickled callback back in another process."""
    return _driver_id(os.getpid())


def _process_started(pid: int) -> float | None:
    """Unix time; None where there is no such process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _pid_namespace() -> str:
    """Containers on one host may share its name, but not its process ids."""
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.is_symlink() else ""


class DriverLease:
    """The right of one driver to write a search, kept in a file of the search's folder.

    Args:
        url: of the file.
    """

    def __init__(self, url: str):
        self._url = url

    def check(self) -> None:
        """Whether it may be taken: it is free, was released, or its driver is gone.

        Raises:
            ValueError: another driver holds it.
        """
        held = read_json(self._url)
        if held is not None and held["driver"] != driver_id():
            _check_gone(held)

    def take(self) -> None:
        """Makes this process the driver.

        Raises:
            ValueError: another driver holds it.
        """
        self.check()
        self._write()

    def renew(self) -> None:
        """Says that this driver is alive.

        Raises:
            SearchTakenOverError: another driver has taken the lease since.
        """
        held = read_json(self._url)
        if held is not None and held["driver"] != driver_id():
            raise SearchTakenOverError(
                f"another driver (process {held['pid']} on {held['host']}) has taken over this search; this one stops"
            )
        self._write()

    def release(self) -> None:
        """Gives the lease back, unless another driver has it by now."""
        held = read_json(self._url)
        if held is not None and held["driver"] == driver_id():
            remove(self._url)

    def _write(self) -> None:
        lease = {
            "driver": driver_id(),
            "host": socket.gethostname(),
            "pid_namespace": _pid_namespace(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "at": time.time(),
        }
        write_json(self._url, lease)


def _check_gone(held: dict[str, Any]) -> None:
    age = max(0.0, time.time() - held["at"])
    where = f"the search is run by process {held['pid']} on {held['host']}, last seen {age:.0f} s ago"
    if (held["host"], held["pid_namespace"]) == (socket.gethostname(), _pid_namespace()):
        started = _process_started(held["pid"])
        # A process id is given again; clocks are set by a second or so.
        if started is not None and abs(started - held["process_started"]) < 2.0:
            raise ValueError(f"{where}, and that process is alive; end it first, or give another search_name")
    elif age < LEASE_SECONDS:
        raise ValueError(
            f"{where}; end it first or, if it is gone, try again in {LEASE_SECONDS - age:.0f} s, or give another "
            "search_name"
        )
