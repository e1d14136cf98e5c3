"""What a deployed service opens to the network: nothing by default, and elsewhere only what holders of keys may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from local import processes
from local.cluster import LocalCluster
from local.jobs import JobFailedError, run_job_on
from store.api_keys import create_api_key, revoke_api_key
from store.database import open_store
from tests.bundle_factory import lesion_image, served_bundle
from tests.test_serve_app import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

REFRESH_S = 1
ANYWHERE = {"0.0.0.0", "::"}


@pytest.fixture
def deploy(ray_connected, tmp_path, dermray_home) -> Iterator[Callable[..., dict]]:
    bundle = served_bundle(tmp_path / "bundle")

    def run(*flags: str) -> dict:
        arguments = ["--bundle", bundle.bundle_uri, "--port", str(ray_connected.http_port), *flags]
        environment = ray_connected.client_environment()
        return run_job_on(
            environment, dermray_home, "deploy_service", arguments, f"expose-{tmp_path.name}-{len(flags)}"
        )

    yield run
    from ray import serve

    serve.shutdown()
    wait_for(lambda: ray_connected.http_port not in ports_of_haproxy(ray_connected), "the end of the proxy")


def listening(cluster: LocalCluster) -> dict[tuple[str, int], str]:
    """Name of the process behind every address and port that the cluster's processes listen on."""
    found = {}
    for process in processes.marked_processes(cluster.state.cluster_id):
        try:
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = process.name()
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    return found


def ports_of_haproxy(cluster: LocalCluster) -> dict[int, str]:
    return {port: ip for (ip, port), name in listening(cluster).items() if name == "haproxy"}


def test_by_default_every_port_of_cluster_and_service_is_on_loopback(deploy, ray_connected):
    deploy()
    found = listening(ray_connected)
    loopback = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert {(address, name) for address, name in found.items() if address[0] not in loopback} == set()
    proxy = ports_of_haproxy(ray_connected)
    # Requests, statistics and metrics.
    assert ray_connected.http_port in proxy and len(proxy) == 3
    with httpx.Client(trust_env=False) as client:
        answers = [client.get(f"http://127.0.0.1:{port}/{path}") for port in proxy for path in ("stats", "metrics")]
    assert any("haproxy_process_" in answer.text for answer in answers)
    assert any("Statistics Report" in answer.text for answer in answers)
    # What was looked at holds the dashboard and the replica behind the proxy.
    ports = {port for _, port in found}
    assert urlsplit(ray_connected.dashboard_url).port in ports
    assert any("ServeReplica" in name for name in found.values())


def test_on_all_addresses_only_holders_of_keys_are_answered(deploy, ray_connected, dermray_home):
    everywhere = ["--host", "0.0.0.0"]
    with pytest.raises(JobFailedError, match="host 0.0.0.0 is not a loopback address.*access.require_keys: true"):
        deploy(*everywhere)
    assert ray_connected.http_port not in {port for _, port in listening(ray_connected)}

    store = open_store(f"sqlite:///{dermray_home}/store.db")
    key, text = create_api_key(store, "clinic", "caller", "Ada")
    other, revoked = create_api_key(store, "left", "caller", "Ada")
    url = deploy(*everywhere, "--access.require-keys", "true", "--access.refresh-s", str(REFRESH_S))["url"]

    def predict(*headers: tuple[str, str]) -> httpx.Response:
        with httpx.Client(timeout=60, trust_env=False) as client:
            return client.post(f"{url}/v1/predict", files={"image": ("x", lesion_image())}, headers=headers)

    refused = predict()
    assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized")
    assert predict(("X-API-Key", text)).status_code == predict(("X-API-Key", revoked)).status_code == 200
    revoke_api_key(store, other.id, "Ada")
    wait_for(lambda: predict(("X-API-Key", revoked)).status_code == 401, "the refusal of a revoked key", 10 * REFRESH_S)
    assert predict(("X-API-Key", text)).status_code == 200

    # Requests come in from anywhere, and nothing else does: the replicas' own ports ask for keys like the proxy's.
    found = listening(ray_connected)
    proxy = ports_of_haproxy(ray_connected)
    assert proxy[ray_connected.http_port] in ANYWHERE
    assert {ip for port, ip in proxy.items() if port != ray_connected.http_port} == {"127.0.0.1"}
    opened = {port: name for (ip, port), name in found.items() if ip in ANYWHERE and name != "haproxy"}
    with httpx.Client(timeout=10, trust_env=False) as client:
        for port, name in opened.items():
            answer = client.get(f"http://127.0.0.1:{port}/v1/predictions")
            assert answer.status_code in (401, 404, 503), f"{name} on port {port}: {answer.text}"
