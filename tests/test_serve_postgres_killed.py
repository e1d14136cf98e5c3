"""PostgreSQL, and the sidecar with it, killed under load on a real cluster: what was answered is stored, and once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.postgres_server import PostgresServer, running_postgres
from tests.test_serve_app import Service, Traffic, deployed_service, replicas, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server that no other test uses."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def service(ray_connected, own_server, tmp_path_factory) -> Iterator[Service]:
    own_server.execute("CREATE DATABASE log")
    home = tmp_path_factory.mktemp("postgres") / "home"
    with deployed_service(ray_connected, home, own_server.url("log")) as service:
        yield service


def spooling(service: Service) -> bool:
    return service.client.get(f"{service.url}/readyz").json()["checks"].get("log") == "spooling"


@pytest.mark.parametrize("with_sidecar", [False, True])
def test_a_killed_database_loses_and_repeats_no_answered_prediction(service, own_server, with_sidecar):
    traffic = Traffic(service)

    def kill() -> None:
        own_server.kill()
        if with_sidecar:
            (victim,) = replicas("DriftLogger")
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: set(replicas("DriftLogger")) - {victim}, "a new DriftLogger")
        traffic.wait_for_answers(30)
        assert spooling(service) and service.spooled() > 0, "the answers without a database are on no disk"
        own_server.restart()
        wait_for(service.ready, "readiness")

    traffic.during(kill)
    wait_for(lambda: service.ready() and service.spooled() == 0, "the replay of the spool")
    stored = service.stored_ids()
    assert set(traffic.answered) <= set(stored)
    assert len(stored) == len(set(stored))
    assert len(set(traffic.answered)) == len(traffic.answered) >= 90
    assert all(problem.startswith("503 ") for problem in traffic.failed), traffic.failed[:3]
