"""Memory of a whole tree of processes: what pages cost them together, and the shared memory of Ray's object store."""

from __future__ import annotations

import os
import threading

import psutil

SHARED_MEMORY = "/dev/shm/"


def _private_and_mapped_bytes(pid: int) -> int:
    """PSS without shared memory, which is counted once for all processes; 0 for a process that has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            fields = dict(line.split()[:2] for line in file.readlines()[1:])
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return 1024 * (int(fields["Pss:"]) - int(fields.get("Pss_Shmem:", 0)))


def _shared_memory_bytes(pids: list[int]) -> int:
    """Bytes that the shared-memory files which these processes hold open really take, each file once."""
    files: dict[int, int] = {}
    for pid in pids:
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{descriptor}"
                if os.readlink(path).startswith(SHARED_MEMORY):
                    status = os.stat(path)
                    files[status.st_ino] = status.st_blocks * 512
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sum(files.values())


def tree_bytes() -> int:
    """PSS of this process and all below it, and the object store and other shared memory that they hold."""
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    return sum(map(_private_and_mapped_bytes, pids)) + _shared_memory_bytes(pids)


class PeakMemory:
    """Samples `tree_bytes` in a thread while the context lasts; `peak_mb` is the highest, in 10**6 bytes."""

    def __init__(self, seconds_between_samples: float = 1.0):
        self._pause = seconds_between_samples
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._peak = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def peak_mb(self) -> float:
        return self._peak / 1e6

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, tree_bytes())
            if self._over.wait(self._pause):
                return
