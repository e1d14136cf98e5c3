"""Finds and ends exactly the processes of one cluster, and nothing else on the host.

Ray's processes leave their parent (workers get process groups of their own, job entry points sessions, HAProxy and the
dashboard's fork server outlive who started them), so neither a process tree nor a group finds them all. Every one
inherits the environment of `ray start`, where a unique mark is set: that finds them, also after a crash.
"""

from __future__ import annotations

import os
import time

import psutil

MARK = "DERMRAY_CLUSTER_ID"
POLL_S = 0.05
# Even SIGKILL takes effect only when the process is scheduled: 20 s were seen on two cores under a load of 70.
KILL_TIMEOUT_S = 90.0


def is_alive(process: psutil.Process) -> bool:
    """Running and not a zombie. psutil compares start times, so a reused pid is not alive."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def marked_processes(cluster_id: str) -> list[psutil.Process]:
    """Live processes that carry the cluster's mark, with their descendants; never the caller or its ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) != cluster_id:
                continue
            for member in (process, *process.children(recursive=True)):
                found[member.pid] = member
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            # Gone meanwhile, or another user's, whose environment we may not read and need not.
            continue
    return [process for pid, process in found.items() if pid not in spared and is_alive(process)]


def wait_until_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Waits until none of the processes lives; returns those that still do after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    alive = [process for process in processes if is_alive(process)]
    while alive and time.monotonic() < deadline:
        time.sleep(POLL_S)
        alive = [process for process in alive if is_alive(process)]
    return alive


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


def end_marked_processes(cluster_id: str, root: psutil.Process | None, grace_s: float = 15.0) -> int:
    """Ends a cluster: SIGTERM to its root, then to what is left of it, then SIGKILL to the rest.

    Args:
        cluster_id: the mark.
        root: the `ray start --block` process, which shuts its own children down in order; None if it has ended.
        grace_s: how long each SIGTERM may take.

    Returns:
        The number of processes that were alive when the call began.

    Raises:
        RuntimeError: a process survived SIGKILL for 90 s.
    """
    at_start = len(marked_processes(cluster_id))
    if root is not None and is_alive(root):
        _signal(root, kill=False)
        wait_until_gone([root], grace_s)
    rest = marked_processes(cluster_id)
    for process in rest:
        _signal(process, kill=False)
    wait_until_gone(rest, min(grace_s, 3.0))
    deadline = time.monotonic() + KILL_TIMEOUT_S
    # In rounds: a process may have started a child between the look and the signal.
    while rest := marked_processes(cluster_id):
        if time.monotonic() > deadline:
            names = ", ".join(f"{process.pid}" for process in rest)
            raise RuntimeError(f"processes {names} of cluster {cluster_id} survived SIGKILL for {KILL_TIMEOUT_S:.0f} s")
        for process in rest:
            _signal(process, kill=True)
        wait_until_gone(rest, 1.0)
    return at_start
