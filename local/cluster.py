"""One Ray head on this host, on loopback with ports and a temporary folder of its own, started and ended by us alone.

`ray stop` ends every Ray process on the host, so it is never used: `ray start --head --block` runs as our child, and
its processes are found by a mark in their environment. The tests and the demo use this class, side by side.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from local import ports, processes
from local.head_environment import LOOPBACK_ONLY, head_environment

STATE_FILE = "cluster.json"
LOG_FILE = "ray-start.log"
# A Unix socket path holds 107 bytes, of which Ray's own part below its temporary folder takes up to 75.
MAX_TEMP_ROOT = 24


@dataclass(frozen=True)
class ClusterState:
    """What a later process needs to use or end the cluster; stored as JSON, without the token itself."""

    cluster_id: str
    pid: int
    process_started: float
    address: str
    dashboard_url: str
    http_port: int
    temp_dir: str
    token_path: str


def _temp_root() -> str:
    root = tempfile.gettempdir()
    return root if len(root) <= MAX_TEMP_ROOT else "/tmp"


class LocalCluster:
    """A single-node Ray cluster with dashboard and token authentication. A context manager.

    Args:
        directory: where the state file and the log of `ray start` are kept; created if missing.
        num_cpus: logical CPUs; default: the host's, at least 2 (training takes one and Ray Data needs the other).
        object_store_bytes: shared memory for objects.
        preferred_dashboard_port, preferred_http_port: used where free; otherwise ports of the cluster's own block.
    """

    def __init__(
        self,
        directory: Path | str,
        num_cpus: int | None = None,
        object_store_bytes: int = 1_000_000_000,
        preferred_dashboard_port: int | None = None,
        preferred_http_port: int | None = None,
    ):
        self.directory = Path(directory)
        self.num_cpus = num_cpus or max(2, os.cpu_count() or 1)
        self.object_store_bytes = object_store_bytes
        self._preferred = (preferred_dashboard_port, preferred_http_port)
        self.state: ClusterState | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def load(cls, directory: Path | str) -> LocalCluster | None:
        """The cluster whose state file is in `directory`, running or not; None without a state file."""
        file = Path(directory) / STATE_FILE
        if not file.exists():
            return None
        cluster = cls(directory)
        cluster.state = ClusterState(**json.loads(file.read_text()))
        return cluster

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """`host:port` for `ray.init`."""
        return self._known().address

    @property
    def dashboard_url(self) -> str:
        """Dashboard and job submission address."""
        return self._known().dashboard_url

    @property
    def http_port(self) -> int:
        """The port that Serve should listen on."""
        return self._known().http_port

    def _known(self) -> ClusterState:
        if self.state is None:
            raise RuntimeError(f"the cluster of {self.directory} has not been started")
        return self.state

    def client_environment(self) -> dict[str, str]:
        """Environment variables with which `ray.init()` and `ray job submit` reach this cluster."""
        state = self._known()
        return {
            "RAY_ADDRESS": state.address,
            "RAY_API_SERVER_ADDRESS": state.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": state.token_path,
            **LOOPBACK_ONLY,
        }

    def _root(self) -> psutil.Process | None:
        state = self._known()
        try:
            root = psutil.Process(state.pid)
            return root if root.create_time() == state.process_started else None
        except psutil.NoSuchProcess:
            return None

    def is_running(self) -> bool:
        """Whether the head process lives."""
        if self.state is None:
            return False
        root = self._root()
        return root is not None and processes.is_alive(root)

    def start(self, timeout_s: float = 120.0) -> None:
        """Starts the head and waits until it takes jobs.

        Raises:
            RuntimeError: this directory's cluster runs already, or the head ended or was not ready in `timeout_s`.
        """
        running = self if self.state else LocalCluster.load(self.directory)
        if running is not None and running.is_running():
            raise RuntimeError(f"a cluster of {self.directory} is running already (pid {running._known().pid})")
        self.directory.mkdir(parents=True, exist_ok=True)
        block = ports.free_block()
        dashboard, http = (
            ports.preferred_port(preferred, otherwise) if preferred else otherwise
            for preferred, otherwise in zip(self._preferred, (block[1], block[2]), strict=True)
        )
        temp_dir = Path(tempfile.mkdtemp(prefix="dermray-", dir=_temp_root()))
        token_path = temp_dir / "token"
        token_path.touch(mode=0o600)
        token_path.write_text(secrets.token_hex(32))
        cluster_id = uuid.uuid4().hex
        address, dashboard_url = f"127.0.0.1:{block[0]}", f"http://127.0.0.1:{dashboard}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        for flag, value in {
            "node-ip-address": "127.0.0.1",
            "port": block[0],
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": block[3],
            "dashboard-agent-grpc-port": block[4],
            "runtime-env-agent-port": block[5],
            "metrics-export-port": block[6],
            "ray-client-server-port": block[7],
            "node-manager-port": block[8],
            "object-manager-port": block[9],
            # 0 = chosen by the kernel; numbered ranges of two clusters would overlap.
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": self.num_cpus,
            "object-store-memory": self.object_store_bytes,
            "temp-dir": temp_dir / "ray",
        }.items():
            command.append(f"--{flag}={value}")
        with open(self.directory / LOG_FILE, "wb") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=head_environment(cluster_id, temp_dir, address, dashboard_url, token_path, block),
                cwd=temp_dir,
                start_new_session=True,
            )
        self.state = ClusterState(
            cluster_id=cluster_id,
            pid=self._child.pid,
            process_started=psutil.Process(self._child.pid).create_time(),
            address=address,
            dashboard_url=dashboard_url,
            http_port=http,
            temp_dir=str(temp_dir),
            token_path=str(token_path),
        )
        # Written before the head is ready, so that an interrupted start can still be ended.
        (self.directory / STATE_FILE).write_text(json.dumps(asdict(self.state), indent=1) + "\n")
        try:
            self._wait_until_ready(timeout_s)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._takes_jobs():
            if not self.is_running():
                raise RuntimeError(f"ray start ended: {self._last_log_line()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"ray start was not ready in {timeout_s:.0f} s: {self._last_log_line()}")
            time.sleep(0.2)

    def _takes_jobs(self) -> bool:
        """The job API answers, and the node's agent, which runs the jobs, has registered."""
        for path in ("/api/jobs/", "/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"):
            try:
                body = self._get(path)
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                return False
            if isinstance(body, dict) and body.get("data", {}).get("result", {}).get("total", 0) < 1:
                return False
        return True

    def _get(self, path: str) -> dict | list:
        state = self._known()
        request = urllib.request.Request(
            state.dashboard_url + path, headers={"Authorization": f"Bearer {Path(state.token_path).read_text()}"}
        )
        # No proxy: the address is loopback, whatever http_proxy says.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            return json.load(response)

    def _last_log_line(self) -> str:
        lines = (self.directory / LOG_FILE).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"no output in {self.directory / LOG_FILE}"

    def stop(self) -> int:
        """Ends every process of this cluster and removes its temporary folder; returns how many processes it had."""
        if self.state is None:
            return 0
        ended = processes.end_marked_processes(self.state.cluster_id, self._root())
        if self._child is not None:
            self._child.wait()
            self._child = None
        shutil.rmtree(self.state.temp_dir, ignore_errors=True)
        (self.directory / STATE_FILE).unlink(missing_ok=True)
        self.state = None
        return ended
