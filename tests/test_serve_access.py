"""Who may call what: by key and role, before the body is read, on the real routes."""

from __future__ import annotations

import asyncio
import threading

import pytest
import sqlalchemy as sql
from starlette.requests import Request
from starlette.testclient import TestClient

from serve import key_ring
from serve.access import ANONYMOUS, LEAST_ROLE, OPEN_PATHS, AccessGuard, Caller, check_owner, is_open, least_role
from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.errors import ApiError
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.rate_limit import TokenBuckets
from serve.served_model import ServedModel
from serve.settings import AccessSettings, DriftLoggerSettings
from store.api_keys import ROLES, create_api_key, list_api_keys, revoke_api_key
from store.database import StoreUnavailableError
from store.shadow_records import shadow_id
from store.tables import api_keys
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

REFRESH_S = 0.05


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("access") / "bundle")


class Guarded:
    """A service that asks for keys, its store, and one key of each role."""

    def __init__(self, reference, places, buckets=None):
        self.log = open_log(places)
        self.store = self.log.store
        self.down = False
        made = {role: create_api_key(self.store, f"the {role}", role, "Ada") for role in ROLES}
        self.keys = {role: text for role, (_, text) in made.items()}
        self.ids = {role: key.id for role, (key, _) in made.items()}
        self.ring = KeyRing(self.load, REFRESH_S)
        durable = DurableLog(LocalSidecar(places), self.log, DriftLoggerSettings())
        nodes = LocalScorer(reference), LocalFusion(reference)
        self.service = prediction_service(nodes, durable)
        self.service.use_model(ServedModel.load(reference))
        self.loaded = threading.Condition()
        self.loads = 0
        behind = backend(self.service, self.log, keys=self.ring, buckets=buckets)
        self.client = TestClient(build_api(behind), raise_server_exceptions=False)

    def load(self):
        with self.loaded:
            self.loads += 1
            self.loaded.notify_all()
        if self.down:
            raise StoreUnavailableError("gone")
        return list_api_keys(self.store, live_only=True)

    def wait_for_refresh(self):
        """Returns once a read that began after this call is in use."""
        with self.loaded:
            seen = self.loads
            # The read after the next begins when the next is in use.
            assert self.loaded.wait_for(lambda: self.loads >= seen + 2, timeout=20)

    def send(self, method="POST", path="/v1/predict", key=None, **options):
        headers = {} if key is None else {"X-API-Key": key}
        return self.client.request(method, path, headers=headers, **options)

    def predict(self, key=None):
        return self.send(key=key, files={"image": ("lesion.jpg", lesion_image())})


@pytest.fixture
def guarded(reference, dermray_home):
    service = Guarded(reference, storage(dermray_home))
    with service.client:
        yield service


def problem(response, status, text):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"} and text in body["detail"]
    return response


def test_a_request_with_a_key_is_answered_and_logged_under_the_keys_name(guarded):
    answer = guarded.predict(guarded.keys["caller"])
    assert answer.status_code == 200
    assert guarded.store.find_prediction(answer.json()["prediction_id"])["caller"] == "the caller"


@pytest.mark.parametrize(
    "change",
    [lambda key: None, lambda key: "", lambda key: key[:-1], lambda key: key + "x", lambda key: key.swapcase()],
)
def test_without_a_live_key_nothing_is_answered(guarded, change):
    response = guarded.predict(change(guarded.keys["admin"]))
    problem(response, 401, "X-API-Key: ")
    assert response.headers["WWW-Authenticate"].startswith("ApiKey")
    assert list(guarded.store.predictions_between(0, 2**62)) == []


def test_a_role_that_this_release_does_not_know_opens_nothing(guarded):
    key, text = create_api_key(guarded.store, "later", "caller", "Ada")
    with guarded.store.writing() as connection:
        connection.execute(sql.update(api_keys).where(api_keys.c.id == key.id).values(role="owner"))
    assert guarded.predict(text).status_code == 401
    assert guarded.predict(guarded.keys["caller"]).status_code == 200


def test_bytes_that_are_no_text_are_no_key(guarded):
    headers = [(b"X-API-Key", b"\xff\xfe" * 100)]
    assert guarded.client.get("/v1/alarms", headers=headers).status_code == 401


def test_a_revoked_key_ends_and_a_new_one_begins_within_a_refresh(guarded):
    assert guarded.predict(guarded.keys["caller"]).status_code == 200
    revoke_api_key(guarded.store, guarded.ids["caller"], "Ada")
    _, text = create_api_key(guarded.store, "the caller", "caller", "Ada")
    guarded.wait_for_refresh()
    problem(guarded.predict(guarded.keys["caller"]), 401, "revoked")
    assert guarded.predict(text).status_code == 200


def test_while_the_store_is_away_the_last_known_keys_stay_valid_and_the_log_says_so_once(guarded, caplog):
    assert guarded.predict(guarded.keys["caller"]).status_code == 200
    guarded.down = True
    guarded.wait_for_refresh()
    guarded.wait_for_refresh()
    assert guarded.predict(guarded.keys["caller"]).status_code == 200
    assert guarded.predict("drk_wrong").status_code == 401
    assert guarded.client.get("/readyz").json()["checks"]["api_keys"] == "last known"
    assert [record.getMessage() for record in caplog.records if "API keys cannot be read" in record.message] == [
        "API keys cannot be read, the last known stay valid: StoreUnavailableError('gone')"
    ]
    guarded.down = False
    guarded.wait_for_refresh()
    assert guarded.client.get("/readyz").json()["checks"]["api_keys"] == "ok"


def test_before_the_keys_were_ever_read_no_key_is_called_wrong(guarded):
    guarded.down = True
    response = problem(guarded.predict(guarded.keys["caller"]), 503, "API keys")
    assert int(response.headers["Retry-After"]) >= 1
    ready = guarded.client.get("/readyz")
    assert ready.status_code == 503 and ready.json()["checks"]["api_keys"] == "never read"
    guarded.down = False
    guarded.wait_for_refresh()
    assert guarded.predict(guarded.keys["caller"]).status_code == 200


def test_a_store_that_hangs_holds_no_request_for_long(monkeypatch):
    monkeypatch.setattr(key_ring, "_FIRST_READ_S", 0.05)
    released = threading.Event()

    async def start():
        ring = KeyRing(lambda: released.wait(30) and [], 1.0)
        try:
            await ring.start()
            return ring.loaded
        finally:
            released.set()

    assert asyncio.run(start()) is False


def test_the_keys_are_read_off_the_event_loop():
    reading, serving = [], []

    def load():
        reading.append(threading.current_thread())
        return []

    async def start():
        serving.append(threading.current_thread())
        await KeyRing(load, 60.0).start()

    asyncio.run(start())
    assert len(reading) == 1 and reading != serving


@pytest.mark.parametrize("place", list(LEAST_ROLE), ids=" ".join)
def test_each_role_may_do_what_the_table_says_and_what_lesser_roles_may(guarded, place):
    method, path = place
    for role in ROLES:
        response = guarded.send(method, path.replace("{}", "x"), guarded.keys[role])
        if ROLES.index(role) < ROLES.index(LEAST_ROLE[place]):
            problem(response, 403, f"needs {LEAST_ROLE[place]} or higher")
        else:
            assert response.status_code not in (401, 403, 500)
    assert guarded.send(method, path.replace("{}", "x")).status_code == 401


def test_every_route_is_in_the_table_or_open(guarded):
    def leaves(routes):
        for route in routes:
            if hasattr(route, "path"):
                yield route
            yield from leaves(getattr(route, "routes", None) or ())

    found = [(route.path, method) for route in leaves(guarded.client.app.routes) for method in route.methods]
    assert ("/v1/predict", "POST") in found
    missing = [
        (method, path)
        for path, method in found
        if not is_open(path) and least_role(method, path.replace("{", "").replace("}", "")) is None
    ]
    assert missing == []


def test_what_the_table_does_not_list_is_closed_to_all_but_administrators(reference, dermray_home):
    service = Guarded(reference, storage(dermray_home))

    @service.client.app.get("/v1/forgotten")
    async def forgotten():
        return "patients"

    with service.client:
        for role in ROLES[:-1]:
            assert service.send("GET", "/v1/forgotten", service.keys[role]).status_code == 403
            assert service.send("DELETE", "/v1/predict", service.keys[role]).status_code == 403
        assert service.send("GET", "/v1/forgotten", service.keys["admin"]).json() == "patients"
        assert service.send("GET", "/v1/nothing", service.keys["admin"]).status_code == 404
        for path in ("/v1/predict/", "//v1/predict", "/healthz/../v1/forgotten", "/healthz/", "/V1/forgotten"):
            assert service.send("POST", path).status_code == 401, path


def test_a_record_of_another_caller_is_not_there(guarded):
    """Holds for whatever the routes of predictions come to answer."""
    found = guarded.predict(guarded.keys["admin"]).json()["prediction_id"]
    assert guarded.send("GET", f"/v1/predictions/{found}", guarded.keys["caller"]).status_code == 404


@pytest.mark.parametrize(
    ("caller", "seen"),
    [
        (Caller("clinic", "caller"), True),
        (Caller("lab", "caller"), False),
        (Caller("lab", "reviewer"), True),
        (ANONYMOUS, True),
    ],
)
def test_callers_see_their_own_records_and_reviewers_all(caller, seen):
    request = Request({"type": "http", "headers": [], "dermray.caller": caller})
    if seen:
        check_owner(request, "clinic", "prediction_id 'x'")
    else:
        with pytest.raises(ApiError, match="404 not_found: prediction_id 'x'"):
            check_owner(request, "clinic", "prediction_id 'x'")


def test_a_shadows_record_is_shown_to_reviewers_and_not_to_its_caller(guarded):
    answered = guarded.predict(guarded.keys["caller"]).json()["prediction_id"]
    row = guarded.store.find_prediction(answered)
    guarded.store.insert_predictions([row | {"id": shadow_id(answered), "role": "shadow", "idempotency_key": None}])
    seen = {role: guarded.send("GET", f"/v1/predictions/{shadow_id(answered)}", guarded.keys[role]) for role in ROLES}
    assert {role: answer.status_code for role, answer in seen.items()} == {
        "caller": 404,
        "reviewer": 200,
        "approver": 200,
        "admin": 200,
    }
    assert guarded.send("GET", f"/v1/predictions/{answered}", guarded.keys["caller"]).status_code == 200


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_open_paths_ask_for_no_key(guarded, path):
    assert guarded.client.get(path).status_code in (200, 404)


def test_health_says_nothing_that_a_key_would_protect(guarded):
    assert guarded.client.get("/healthz").json() == {"status": "ok", "checks": {}}
    card = guarded.client.get("/v1/model")
    assert card.status_code == 200 and card.json()["digest"]


def test_the_document_says_which_requests_need_a_key(guarded):
    document = guarded.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"] == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    predict = document["paths"]["/v1/predict"]["post"]
    assert predict["security"] and {"401", "403", "429", "503"} <= set(predict["responses"])
    assert "security" not in document["paths"]["/healthz"]["get"]
    open_service = TestClient(build_api(backend(guarded.service, guarded.log)))
    assert "securitySchemes" not in open_service.get("/openapi.json").json()["components"]


def test_an_open_service_takes_everyone_for_anonymous(guarded):
    answer = TestClient(build_api(backend(guarded.service, guarded.log))).post(
        "/v1/predict", files={"image": ("x", lesion_image())}, headers={"X-API-Key": guarded.keys["reviewer"]}
    )
    row = guarded.store.find_prediction(answer.json()["prediction_id"])
    assert row["caller"] == ANONYMOUS.name == "anonymous"


def test_a_key_over_its_rate_waits_and_others_do_not(reference, dermray_home):
    now = [0.0]
    service = Guarded(reference, storage(dermray_home), TokenBuckets(0.4, 2, clock=lambda: now[0]))
    with service.client:
        ask = lambda role: service.send("GET", "/v1/nothing", service.keys[role])  # noqa: E731
        assert [ask("caller").status_code for _ in range(3)] == [403, 403, 429]
        refused = problem(ask("caller"), 429, "too many requests")
        assert refused.headers["Retry-After"] == "3"
        assert ask("reviewer").status_code == 403
        assert service.client.get("/healthz").status_code == 200
        now[0] += 2.6
        assert [ask("caller").status_code for _ in range(2)] == [403, 429]


def exchange(app, headers, body_messages=(), scope_type="http"):
    """Sends body messages to an ASGI app; returns its answers, each with how many messages were read before it."""
    messages, read, answers = list(body_messages), [], []

    async def receive():
        read.append(1)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        answers.append((len(read), message))

    scope = {"type": scope_type, "path": "/v1/predict", "method": "POST", "headers": headers}
    asyncio.run(app(scope, receive, send))
    return answers


def test_a_refusal_comes_before_the_application_and_after_the_body():
    """Closed with bytes unread, a connection is reset before the client has the answer."""

    async def never(scope, receive, send):
        raise AssertionError("the application was asked")

    guard = AccessGuard(never, KeyRing(list, 60.0))
    body = [{"type": "http.request", "body": b"x", "more_body": index < 2} for index in range(3)]
    (read, start), _ = exchange(guard, [], body)
    assert (start["status"], read) == (401, 3)
    assert b"connection" not in dict(start["headers"])
    endless = [{"type": "http.request", "body": bytes(2**20), "more_body": True}] * 100
    (read, start), _ = exchange(AccessGuard(never, KeyRing(list, 60.0)), [], endless)
    assert start["status"] == 401 and read < 100 and dict(start["headers"])[b"connection"] == b"close"
    assert exchange(guard, [], scope_type="websocket")[0][1]["type"] == "websocket.close"


def test_the_caller_is_known_to_the_application(guarded):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["dermray.caller"])

    key = guarded.keys["reviewer"].encode()
    guard = AccessGuard(app, KeyRing(guarded.load, 60.0))
    exchange(guard, [(b"x-api-key", key)])
    assert seen == [Caller("the reviewer", "reviewer")]


def test_buckets_of_keys_long_unused_are_forgotten():
    now = [0.0]
    buckets = TokenBuckets(1.0, 1, max_buckets=3, clock=lambda: now[0])
    for key in "abcd":
        assert buckets.take(key) == 0.0
    assert len(buckets) == 3
    assert buckets.take("d") == pytest.approx(1.0)
    assert buckets.take("a") == 0.0
    now[0] = 0.25
    assert buckets.take("d") == pytest.approx(0.75)


def test_a_rate_per_key_needs_keys():
    with pytest.raises(ValueError, match="require_keys: true"):
        AccessSettings(requests_per_s=5)
    assert AccessSettings(requests_per_s=5, require_keys=True).burst >= 1


def test_routes_of_the_table_are_matched_whole():
    assert least_role("GET", "/v1/predictions/x/image") == "reviewer"
    assert least_role("HEAD", "/v1/alarms") == "reviewer"
    assert least_role("GET", "/v1/predictions/x\n") == "caller"
    assert least_role("GET", "/v1/predictions/a/b") is None and least_role("GET", "/v1/predictions/") is None
