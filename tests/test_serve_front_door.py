"""A full service refuses before Serve has handled a request, and nobody passes the door unasked or is asked twice."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

import httpx
import pytest
from ray.serve._private.http_util import _apply_middlewares

from serve import front_door
from serve.front_door import http_middlewares, open_front_door
from serve.guards import NOTICE_HEADER
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.metrics import PROBLEMS
from serve.rate_limit import TokenBuckets
from serve.request_ids import MAX_IDS, show_ids_in_log
from serve.settings import AdmissionSettings
from store.api_keys import create_api_key, list_api_keys
from tests.bundle_factory import LocalFusion, LocalScorer, backend, lesion_image, served_bundle
from tests.figures import Figures
from tests.local_service import LocalService


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("door") / "bundle")


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


def wait_for(condition, seconds=10.0):
    async def look():
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)

    asyncio.run(look())


class Replica:
    """The HTTP server of a replica: our middleware, as Serve puts it around its own handling, and the application."""

    def __init__(self, local, **guards):
        self.local = local
        self.seen_by_serve = []
        self.figures = Figures()
        behind = backend(local.service, local.log, metrics=self.figures, **guards)
        self.api = build_api(dataclasses.replace(behind, answers_ids=False))
        open_front_door(self.api.door)
        self.server = _apply_middlewares(self._serve, http_middlewares())

    async def _serve(self, scope, receive, send):
        self.seen_by_serve.append(scope["path"])
        await self.api(scope, receive, send)

    def client(self, app=None):
        transport = httpx.ASGITransport(app or self.server, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://replica")

    def run(self, scenario, app=None):
        """Runs `scenario(client)`."""

        async def main():
            async with self.client(app) as client:
                return await scenario(client)

        return asyncio.run(main())


async def predict(client, path="/v1/predict", **headers):
    return await client.post(path, files={"image": ("x", lesion_image())}, headers=headers)


@pytest.fixture
def make(reference, nodes, dermray_home):
    def make(admission=None, **guards):
        local = LocalService(reference, dermray_home, nodes=nodes)
        if admission is not None:
            scoring = local.service.scoring
            scoring.settings = scoring.settings.model_copy(update={"admission": admission})
        return Replica(local, **guards)

    yield make
    front_door._door = None


@pytest.fixture
def full(make, monkeypatch):
    """One request is inside, and more may not even wait: `refused(n)` answers of so many others."""
    replica = make(AdmissionSettings(max_requests=1, max_waiting=0))
    predicting = replica.local.service.predict
    entered, leave = asyncio.Event(), asyncio.Event()

    async def held(*arguments, **options):
        entered.set()
        await leave.wait()
        return await predicting(*arguments, **options)

    monkeypatch.setattr(replica.local.service, "predict", held)

    def refused(number, app=None, then=lambda: None, path="/v1/predict"):
        async def scenario(client):
            inside = asyncio.create_task(predict(client))
            await entered.wait()
            before = len(replica.seen_by_serve)
            answers = [await predict(client, path, **{"X-Request-ID": f"r{n}"}) for n in range(number)]
            assert len(replica.seen_by_serve) == before, "Serve handled a request that was refused"
            await asyncio.to_thread(then)
            leave.set()
            assert (await inside).status_code == 200
            return answers

        return replica.run(scenario, app)

    replica.refused = refused
    return replica


def test_who_is_refused_was_never_seen_by_serve_and_has_an_answer_like_any_other(full):
    (answer,) = full.refused(1)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
    assert answer.json()["error"] == "unavailable"
    assert answer.headers.get_list("X-Request-ID") == ["r0"]
    assert "Not a medical device" in answer.headers[NOTICE_HEADER]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert full.figures.values(PROBLEMS, "/v1/predict", "503", "unavailable") == [1]


def test_the_same_door_stands_inside_where_requests_come_another_way(full, monkeypatch):
    """As through Serve's own proxy, or where the cluster does not know of our middleware."""
    (answer,) = full.refused(1, app=full.api)
    assert answer.status_code == 503 and "Not a medical device" in answer.headers[NOTICE_HEADER]


def test_the_log_says_how_many_were_refused_and_which(full, caplog, monkeypatch):
    monkeypatch.setattr(front_door, "_LOG_S", 0.05)
    show_ids_in_log()

    def lines():
        return [record.getMessage() for record in caplog.records if "at the door" in record.getMessage()]

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        full.refused(MAX_IDS + 2, then=lambda: wait_for(lines))
    shown = "\n".join(lines())
    assert sum(int(line.rpartition(": ")[2]) for line in lines()) == MAX_IDS + 2
    assert "[requests r0" in shown and "/v1/predict 503: " in shown
    assert len(lines()) < MAX_IDS / 4


def test_who_is_let_in_is_asked_and_counted_once(make):
    """A key has so many requests a second: asked twice, it would have half of them."""
    replica = make()
    store = replica.local.log.store
    _, key = create_api_key(store, "clinic", "caller", "Ada")
    ring = KeyRing(lambda: list_api_keys(store, live_only=True), 60)
    buckets = TokenBuckets(0.001, 2)
    replica = Replica(replica.local, keys=ring, buckets=buckets)

    async def scenario(client):
        statuses = [(await predict(client, **{"X-API-Key": key})).status_code for _ in range(3)]
        wrong = await predict(client, **{"X-API-Key": "dr_wrong"})
        return statuses, wrong

    statuses, wrong = replica.run(scenario)
    assert statuses == [200, 200, 429]
    assert wrong.status_code == 401 and wrong.json()["error"] == "unauthorized"
    assert replica.seen_by_serve == ["/v1/predict"] * 2
    assert replica.figures.values(PROBLEMS, "/v1/predict", "429", "too_many_requests") == [1]


def test_nobody_gets_past_the_inner_door_by_what_a_request_can_say(make):
    """Nor by the mark of another door: of an application that this process served before."""
    replica = make()
    store = replica.local.log.store
    ring = KeyRing(lambda: list_api_keys(store, live_only=True), 60)
    guarded = Replica(replica.local, keys=ring)
    open_front_door(replica.api.door)  # which asks for no key
    assert guarded.run(predict).status_code == 401
    for name in ("dermray.visit", "dermray-visit", "X-Dermray-Visit"):
        assert guarded.run(lambda client, name=name: predict(client, **{name: "1"})).status_code == 401


def test_other_routes_come_to_serve_as_before(make):
    replica = make()

    async def scenario(client):
        return [
            (await client.get("/readyz")).status_code,
            (await client.get("/v1/predict")).status_code,
            (await client.post("/v1/labels", json={})).status_code,
            (await client.get("/nowhere")).status_code,
        ]

    assert replica.run(scenario) == [200, 405, 422, 404]
    assert replica.seen_by_serve == ["/readyz", "/v1/predict", "/v1/labels", "/nowhere"]


def test_what_fails_at_the_door_is_answered_and_logged_without_what_it_said(make, caplog):
    class Failing:
        loaded = True

        def find(self, given):
            raise RuntimeError("patient 7")

    failing = make(keys=Failing())
    answer = failing.run(lambda client: predict(client, **{"X-API-Key": "k"}))
    assert answer.status_code == 500 and answer.json()["error"] == "internal_error"
    assert "patient 7" not in answer.text and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "patient 7" in caplog.text
    assert failing.figures.values(PROBLEMS, "/v1/predict", "500", "internal_error") == [1]


def test_a_path_that_a_route_takes_for_another_is_no_way_past_admission(full):
    """Starlette's routes overlook a line break at the end."""
    (answer,) = full.refused(1, app=full.api, path="/v1/predict%0A")
    assert answer.status_code == 503


def test_a_client_that_has_gone_is_no_problem(make):
    """Serve answers it 499, which nobody reads."""
    replica = make()

    async def gone(scope, receive, send):
        await send({"type": "http.response.start", "status": 499, "headers": []})
        await send({"type": "http.response.body", "body": b"gone"})

    assert replica.run(predict, _apply_middlewares(gone, http_middlewares())).status_code == 499
    assert replica.figures.labels(PROBLEMS) == set()
