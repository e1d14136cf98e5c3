"""The servers under measurement, each started for one run and ended with all its processes."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from local.cluster import LocalCluster
from local.processes import marked_processes, wait_until_gone
from ray_jobs.job_client import parse_result

START_TIMEOUT_S = 120.0
_REPLICA = re.compile(r"ray::ServeReplica:\w+:(\w+)")


@dataclass(frozen=True)
class Variant:
    """A running server.

    Attributes:
        url: where it answers.
        cpu_seconds: CPU time of its processes so far, by what they do.
        home: DERMRAY_HOME of our own service; None of a peer.
    """

    url: str
    cpu_seconds: Callable[[], Counter[str]]
    home: Path | None = None


def replica_name(process: psutil.Process) -> str | None:
    """The deployment whose replica this process is; None for any other."""
    try:
        found = _REPLICA.search(" ".join(process.cmdline()))
    except psutil.NoSuchProcess:
        return None
    return found[1] if found else None


def _part(process: psutil.Process) -> str:
    """What a process of our cluster does for a request."""
    return replica_name(process) or ("HAProxy" if process.name() == "haproxy" else "Ray itself")


def cpu_seconds(processes: Callable[[], list[psutil.Process]], part: Callable[[psutil.Process], str]) -> Counter[str]:
    """User and system time of live processes, by part."""
    seconds: Counter[str] = Counter()
    for process in processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[part(process)] += times.user + times.system
    return seconds


@contextlib.contextmanager
def peer(kind: str, bundle: str) -> Iterator[Variant]:
    """A server of `benchmarks.serving_peers`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serving_peers", "--kind", kind]
    command += ["--bundle", bundle, "--port", str(port)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(port, process)
        family = lambda: [process, *process.children(recursive=True)]  # noqa: E731
        yield Variant(f"http://127.0.0.1:{port}", lambda: cpu_seconds(family, lambda _: kind))
    finally:
        members = [process, *process.children(recursive=True)]
        process.terminate()
        for member in wait_until_gone(members, 5.0):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


@contextlib.contextmanager
def own_service(bundle: str, flags: list[str]) -> Iterator[Variant]:
    """The graph on a cluster of its own, with an empty home and its durable log on."""
    with tempfile.TemporaryDirectory(prefix="dermray-benchmark-") as home, LocalCluster(Path(home)) as cluster:
        command = [sys.executable, "-m", "ray_jobs.deploy_service", "--bundle", str(Path(bundle).absolute())]
        command += ["--port", str(cluster.http_port), *flags]
        environment = {**os.environ, **cluster.client_environment(), "DERMRAY_HOME": home}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        assert cluster.state is not None
        cluster_id = cluster.state.cluster_id
        yield Variant(
            parse_result(done.stdout)["url"],
            lambda: cpu_seconds(lambda: marked_processes(cluster_id), _part),
            Path(home),
        )


def _wait_until_it_listens(port: int, process: psutil.Process) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE or time.monotonic() > deadline:
            raise RuntimeError(f"the server on port {port} did not start")
        time.sleep(0.1)
