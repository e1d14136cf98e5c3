"""A replayed request is logged at its own time, where the service takes replays and an administrator sends it."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.served_model import ServedModel
from serve.settings import DriftLoggerSettings, IngressSettings
from store.api_keys import create_api_key, list_api_keys
from store.tables import now_us
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    LocalSidecar,
    backend,
    lesion_image,
    prediction_service,
    served_bundle,
    storage,
)

MOMENT, MOMENT_US = "2026-03-01T09:30:00Z", 1_772_357_400_000_000


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("replays") / "bundle")


@pytest.fixture
def make_service(reference, dermray_home):
    """Opens a service: its client, `send(moment, key)`, its store, and a key of two roles where it asks for keys."""

    def make(accepted: bool, with_keys: bool = False):
        log = open_log(storage(dermray_home))
        roles = ("reviewer", "admin") if with_keys else ()
        keys = {role: create_api_key(log.store, f"the {role}", role, "Ada")[1] for role in roles}
        ring = KeyRing(lambda: list_api_keys(log.store, live_only=True), 60) if with_keys else None
        durable = DurableLog(LocalSidecar(storage(dermray_home)), log, DriftLoggerSettings())
        nodes = LocalScorer(reference), LocalFusion(reference)
        service = prediction_service(nodes, durable, settings=IngressSettings(accept_replays=accepted))
        service.use_model(ServedModel.load(reference))
        client = TestClient(build_api(backend(service, log, keys=ring)), raise_server_exceptions=False)

        def send(moment, key=None, path="/v1/predict", field="image"):
            headers = {name: value for name, value in (("Replayed-At", moment), ("X-API-Key", key)) if value}
            return client.post(path, headers=headers, files={field: ("lesion.jpg", lesion_image())})

        return client, send, log.store, keys

    return make


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/predict", "image"), ("/v1/predict/batch", "images")],
)
def test_a_replay_is_logged_on_its_own_day(make_service, path, field):
    client, send, store, _ = make_service(accepted=True)
    with client:
        answer = send(MOMENT, path=path, field=field)
        assert answer.status_code == 200, answer.text
        (row,) = store.predictions_between(MOMENT_US, MOMENT_US + 1)
        assert row["received_at"] == MOMENT_US
        before = now_us()
        assert send(None, path=path, field=field).status_code == 200
        (today,) = store.predictions_between(before, now_us() + 1)
        assert today["id"] != row["id"]


def test_a_service_that_takes_no_replays_logs_none_as_of_today(make_service):
    client, send, store, _ = make_service(accepted=False)
    with client:
        refused = send(MOMENT)
        assert refused.status_code == 403 and "ingress.accept_replays" in refused.json()["detail"]
        assert list(store.predictions_between(0, 2**62)) == []


def test_replays_are_the_administrators_alone(make_service):
    client, send, store, keys = make_service(accepted=True, with_keys=True)
    with client:
        assert send(MOMENT, keys["reviewer"]).status_code == 403
        assert send(None, keys["reviewer"]).status_code == 200
        assert send(MOMENT, keys["admin"]).status_code == 200
        assert send(MOMENT).status_code == 401
    callers = [row["caller"] for row in store.predictions_between(MOMENT_US, MOMENT_US + 1)]
    assert callers == ["the admin"]


@pytest.mark.parametrize("moment", ["yesterday", "2999-01-01T00:00:00Z", "1969-12-31", "2026-13-01", "\xff"])
def test_a_replay_without_a_time_of_the_past_is_refused(make_service, moment):
    client, send, store, _ = make_service(accepted=True)
    with client:
        refused = send(moment.encode("latin-1"))
        assert refused.status_code == 422 and refused.json()["detail"].startswith("Replayed-At")
    assert list(store.predictions_between(0, 2**62)) == []
