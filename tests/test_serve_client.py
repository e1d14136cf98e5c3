"""The client on the real routes over real connections, and what it does when answers are missing or say "later"."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import logging
import subprocess
import sys
from email.utils import format_datetime

import httpx
import pytest

from monitoring.prediction_log import PredictionRecord
from serve.api import Prediction
from serve.async_client import AsyncDermrayClient
from serve.client import (
    ConflictError,
    DermrayClient,
    DermrayError,
    RefusedError,
    RetryPolicy,
    UnavailableError,
)
from serve.client_calls import PredictionFilters
from serve.record_query import PredictionQuery
from serve.times import moment
from store.api_keys import create_api_key
from store.candidates import mark_candidate, record_candidate
from tests.bundle_factory import blank_image, lesion_image, lesion_rule
from tests.house import REPO_ROOT
from tests.http_server import http_server
from tests.local_service import LocalService
from tests.tiny_bundle import tiny_bundle

(ANSWER,) = Prediction.model_config["json_schema_extra"]["examples"]
LATER = {"error": "unavailable", "detail": "later"}
METADATA = {"age_approx": 60, "sex": "female"}
CLIENTS = pytest.mark.parametrize("kind", ["sync", "async"])


class FakeTime:
    """A clock that moves when someone sleeps, or sends."""

    def __init__(self):
        self.now = 0.0
        self.waits = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    async def async_sleep(self, seconds):
        self.sleep(seconds)


class Script:
    """Answers requests in turn: a response, or an exception to raise; the last one stays."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, body, headers = (*answer, {}, {})[:3]
        return httpx.Response(status, json=body, headers=headers)

    def keys(self):
        return [request.headers.get("Idempotency-Key") for request in self.requests]


async def awaited(found):
    if hasattr(found, "__aiter__"):
        return [item async for item in found]
    return await found


def ask(kind, script, do, time=None, attempts=8, **options):
    """What `do(client)` gives with a client of either kind."""
    time = time or FakeTime()
    retries = RetryPolicy(attempts=attempts, clock=time, random=lambda: 0.5)
    transport = httpx.MockTransport(script)
    if kind == "sync":
        with DermrayClient("http://service", retries=retries, transport=transport, sleep=time.sleep, **options) as one:
            found = do(one)
            return list(found) if inspect.isgenerator(found) else found

    async def story():
        async with AsyncDermrayClient(
            "http://service", retries=retries, transport=transport, sleep=time.async_sleep, **options
        ) as one:
            return await awaited(do(one))

    return asyncio.run(story())


def predict(client):
    return client.predict(b"jpeg", METADATA)


@CLIENTS
def test_a_503_is_sent_again_after_retry_after_under_one_key(kind):
    script = Script((503, LATER, {"Retry-After": "7"}), (429, LATER, {"Retry-After": "3"}), (200, ANSWER))
    time = FakeTime()
    assert ask(kind, script, predict, time) == Prediction(**ANSWER)
    assert 7 <= time.waits[0] < 8 and 3 <= time.waits[1] < 4
    assert len(set(script.keys())) == 1 and len(script.keys()[0]) == 32
    assert len({request.content.split(b"\r\n", 1)[1].count(b"jpeg") for request in script.requests}) == 1


@CLIENTS
def test_every_call_has_a_key_of_its_own_unless_given(kind):
    script = Script((200, ANSWER))
    ask(kind, script, predict)
    ask(kind, script, predict)
    ask(kind, script, lambda client: client.predict(b"jpeg", idempotency_key="mine"))
    first, second, third = script.keys()
    assert first != second and third == "mine"


@CLIENTS
def test_retry_after_may_be_a_date_and_counts_from_the_services_clock(kind):
    sent = moment(1_714_555_800_000_000)
    later = moment(1_714_555_812_000_000)
    headers = {"Retry-After": format_datetime(later, usegmt=True), "Date": format_datetime(sent, usegmt=True)}
    time = FakeTime()
    ask(kind, Script((503, LATER, headers), (200, ANSWER)), predict, time)
    assert 12 <= time.waits[0] < 13


@CLIENTS
def test_a_wait_beyond_the_deadline_is_not_begun(kind):
    time = FakeTime()
    script = Script((503, LATER, {"Retry-After": "31"}))
    with pytest.raises(UnavailableError) as caught:
        ask(kind, script, predict, time, timeout_s=30)
    assert (caught.value.status, caught.value.error, caught.value.retry_after_s) == (503, "unavailable", 31)
    assert time.waits == [] and len(script.requests) == 1


@CLIENTS
@pytest.mark.parametrize("answer", [(503, LATER, {"Retry-After": "4"}), (503, LATER), httpx.ConnectError("refused")])
def test_all_waits_end_before_the_deadline(kind, answer):
    time, script = FakeTime(), Script(answer)
    with pytest.raises(UnavailableError):
        ask(kind, script, predict, time, timeout_s=30, attempts=1000)
    assert 20 < sum(time.waits) < 30
    assert len(script.requests) == len(time.waits) + 1


@CLIENTS
def test_time_outs_of_attempts_shrink_to_what_is_left(kind):
    time, script = FakeTime(), Script((503, LATER, {"Retry-After": "20"}), (200, ANSWER))
    ask(kind, script, predict, time, timeout_s=30)
    first, second = (request.extensions["timeout"]["read"] for request in script.requests)
    assert first == 30 and second == pytest.approx(30 - time.waits[0])


@CLIENTS
def test_back_off_grows_to_its_cap_and_attempts_end(kind):
    time = FakeTime()
    with pytest.raises(UnavailableError) as caught:
        ask(kind, Script(httpx.ReadError("reset")), predict, time, attempts=9, timeout_s=1000)
    assert time.waits == [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert (caught.value.status, caught.value.error, caught.value.detail) == (None, "no_answer", "ReadError reset")


@CLIENTS
@pytest.mark.parametrize(("status", "error"), [(400, RefusedError), (409, ConflictError), (422, RefusedError)])
def test_what_is_wrong_is_not_sent_again(kind, status, error):
    script = Script((status, {"error": "invalid_field", "detail": "sex: 7"}, {"Retry-After": "1"}))
    with pytest.raises(error, match=f"{status} invalid_field: sex: 7") as caught:
        ask(kind, script, predict)
    assert len(script.requests) == 1 and not isinstance(caught.value, UnavailableError)


@CLIENTS
@pytest.mark.parametrize(
    "do",
    [lambda c: c.retrain("new camera"), lambda c: c.approve("4", "fewer missed"), lambda c: c.ask_rollback("4", "x")],
)
def test_orders_are_sent_again_only_where_the_service_cannot_have_begun(kind, do):
    for answer in (httpx.ReadError("reset"), httpx.ReadTimeout("slow"), (503, LATER, {"Retry-After": "1"}), (504,)):
        script = Script(answer)
        with pytest.raises(UnavailableError):
            ask(kind, script, do)
        assert len(script.requests) == 1
    for answer in (httpx.ConnectError("refused"), (429, LATER, {"Retry-After": "1"}), (408, LATER)):
        script = Script(answer, (422, {"error": "invalid_field", "detail": "x"}))
        with pytest.raises(RefusedError):
            ask(kind, script, do)
        assert len(script.requests) == 2


def test_a_request_that_httpx_cannot_send_is_not_tried_again():
    script = Script(httpx.LocalProtocolError("illegal header"))
    with pytest.raises(UnavailableError, match="illegal header"):
        ask("sync", script, predict)
    assert len(script.requests) == 1


def test_an_answer_of_something_else_is_an_error_that_quotes_nothing():
    def page(request):
        return httpx.Response(404, text="<html>patient Jane</html>")

    with pytest.raises(RefusedError) as caught:
        ask("sync", page, lambda client: client.prediction("x"))
    assert (caught.value.status, caught.value.error) == (404, "http_error") and "Jane" not in str(caught.value)
    with pytest.raises(DermrayError, match="unexpected_answer.*POST /v1/predict.*risk") as wrong:
        ask("sync", Script((200, ANSWER | {"risk": "patient Jane"})), predict)
    assert "Jane" not in str(wrong.value) and wrong.value.__cause__ is None
    with pytest.raises(DermrayError, match="unexpected_answer.*/v1/explain"):
        ask("sync", Script((200, {})), lambda client: client.explain(b"jpeg"))
    with pytest.raises(DermrayError, match="500 internal_error"):
        ask("sync", Script((500, {"error": "internal_error", "detail": "x"})), predict)


def test_an_answer_that_trickles_in_does_not_pass_the_deadline():
    time = FakeTime()

    class Trickle(httpx.SyncByteStream):
        def __iter__(self):
            for _ in range(100):
                time.now += 1
                yield b" "

    with pytest.raises(UnavailableError, match="timeout"):
        ask("sync", lambda _: httpx.Response(200, stream=Trickle()), predict, time, timeout_s=10)
    assert time.now == 11


def test_an_async_answer_that_does_not_come_ends_with_the_deadline():
    async def silent(request):
        await asyncio.Event().wait()

    with pytest.raises(UnavailableError, match="timeout"):
        ask("async", silent, predict, timeout_s=0.05, attempts=1)


def test_a_cancelled_call_sends_nothing_more_and_leaves_the_client_usable():
    async def story():
        entered, ended, requests = asyncio.Event(), [], []

        async def answer(request):
            requests.append(request)
            if len(requests) > 1:
                return httpx.Response(200, json=ANSWER)
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        transport = httpx.MockTransport(answer)
        async with AsyncDermrayClient("http://service", transport=transport) as client:
            call = asyncio.create_task(client.predict(b"jpeg"))
            await entered.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert ended == [True] and len(requests) == 1
            assert (await client.predict(b"jpeg")).risk == ANSWER["risk"]

    asyncio.run(story())


@CLIENTS
def test_waiting_for_a_submission_asks_less_often_and_ends_in_time(kind):
    def state(name):
        body = {"submission_id": "a", "state": name, "submitted_at": "2024-05-01T09:30:00Z", "attempts": 1}
        return 200, body | {"finished_at": None, "result": None, "error": None}

    time, script = FakeTime(), Script(*[state("queued")] * 9, state("failed"))
    found = ask(kind, script, lambda client: client.wait_for_submission("a"), time)
    assert found.state == "failed" and time.waits == sorted(time.waits) and time.waits[-1] <= 5
    time = FakeTime()
    with pytest.raises(UnavailableError, match="submission a is running after 60 s"):
        ask(kind, Script(state("running")), lambda client: client.wait_for_submission("a", timeout_s=60), time)
    assert 59 < time.now <= 60


def test_readiness_is_asked_once_and_unavailable_is_an_answer():
    health = {"status": "unavailable", "checks": {"log": "no answer"}}
    script = Script((503, health, {"Retry-After": "1"}))
    assert ask("sync", script, lambda client: client.ready()).status == "unavailable"
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(UnavailableError):
        ask("sync", script, lambda client: client.ready())
    assert len(script.requests) == 1


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DERMRAY_API_KEY", " from-the-environment\n")
    script = Script((401, {"error": "unauthorized", "detail": "X-API-Key: no live API key"}))
    for arguments, sent in (({"api_key": "s3cret"}, "s3cret"), ({}, "from-the-environment")):
        with DermrayClient("http://service", transport=httpx.MockTransport(script), **arguments) as client:
            with pytest.raises(RefusedError) as caught:
                client.candidates()
            assert script.requests[-1].headers["X-API-Key"] == sent
            assert sent not in caplog.text + repr(client) + repr(caught.value) + str(caught.value)
    monkeypatch.delenv("DERMRAY_API_KEY")
    with DermrayClient("http://service", transport=httpx.MockTransport(Script((200, [])))) as client:
        assert client.candidates() == [] and "X-API-Key" not in client._http.headers
    with pytest.raises(ValueError) as refused:
        DermrayClient("http://service", "s3cret\nX-Other: 1")
    assert "s3cret" not in str(refused.value)
    # Another host than the service's would get it.
    moved = Script((307, {}, {"Location": "http://elsewhere/"}))
    with pytest.raises(DermrayError, match="307"):
        ask("sync", moved, lambda client: client.candidates())
    assert len(moved.requests) == 1


@pytest.mark.parametrize("url", ["service:8000", "ftp://service", "http://", ""])
def test_a_wrong_url_is_refused_at_once(url):
    with pytest.raises(ValueError, match="base_url"):
        DermrayClient(url)


def test_both_clients_have_the_same_methods():
    def methods(kind):
        return {
            name: [str(parameter) for parameter in inspect.signature(value).parameters.values()]
            for name, value in vars(kind).items()
            if inspect.isfunction(value) and not name.startswith("_")
        }

    assert methods(DermrayClient) == methods(AsyncDermrayClient)
    filters = {name.rstrip("_") for name in PredictionFilters.__annotations__} | {"cursor"}
    assert filters == {field.alias or name for name, field in PredictionQuery.model_fields.items()}


def test_importing_the_client_loads_neither_ray_nor_a_service(tmp_path):
    code = "import json, sys, serve.client, serve.async_client; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"ray", "cv2", "torch", "fastapi", "starlette", "sqlalchemy", "pandas", "onnxruntime"}


# The real routes.


class Drop(httpx.HTTPTransport):
    """Loses the next answers on their way, after the service gave them."""

    lost = 0

    def handle_request(self, request):
        response = super().handle_request(request)
        if self.lost:
            self.lost -= 1
            response.read()
            response.close()
            raise httpx.ReadError("connection reset")
        return response


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from serve.settings import ModelReference

    directory = tmp_path_factory.mktemp("client") / "bundle"
    bundle = tiny_bundle(directory, contexts=["image_only", "none", "patient"], abstention=lesion_rule())
    return ModelReference(bundle_uri=str(directory), sha256=bundle.digest, version="7")


@pytest.fixture
def local(reference, dermray_home):
    return LocalService(reference, dermray_home)


@pytest.fixture
def served(local):
    with http_server(local) as url:
        local.url = url
        yield local


@pytest.fixture
def client(served):
    policy = RetryPolicy(backoff_s=0.01)
    with DermrayClient(served.url, transport=Drop(), retries=policy, trust_env=False) as made:
        yield made


def test_pictures_come_as_path_bytes_or_file(client, served, tmp_path):
    data = lesion_image(2001)
    path = tmp_path / "Jane Doe.jpg"
    path.write_bytes(data)
    answers = [client.predict(image, METADATA) for image in (path, str(path), data, io.BytesIO(data))]
    assert len({(answer.risk, answer.context) for answer in answers}) == 1 and answers[0].risk is not None
    assert len({row["image_hash"] for row in served.rows()}) == 1 and len(served.rows()) == 4
    with pytest.raises(FileNotFoundError):
        client.predict(tmp_path / "missing.jpg")
    with pytest.raises(TypeError, match="image: StringIO"):
        client.predict(io.StringIO("text"))
    with pytest.raises(RefusedError, match="422 invalid_field: .*age_approx"):
        client.predict(data, {"age_approx": 900})


@pytest.mark.parametrize("lost", [1, 3])
def test_what_was_stored_before_the_connection_broke_is_stored_once(client, served, lost):
    client._http._transport.lost = lost
    answer = client.predict(lesion_image(2001), METADATA, patient_id="p", acquired_at=moment(1_714_555_800_000_000))
    (row,) = served.rows()
    assert row["id"] == answer.prediction_id and row["acquired_at"] == 1_714_555_800_000_000
    client._http._transport.lost = lost
    first = client.label(answer.prediction_id, "malignant", labeller="Dr Weber", confidence=0.9)
    assert client.label(answer.prediction_id, "malignant", labeller="Dr Weber", confidence=0.9) == first
    assert client.prediction(answer.prediction_id).labels == [first]
    client._http._transport.lost = lost
    accepted = client.submit(lesion_image(2002))
    assert client.wait_for_submission(accepted.submission_id).result.prediction_id
    assert len(served.rows()) == 2


def test_many_pictures_and_what_the_network_saw(client, served):
    images = [lesion_image(2001), b"no picture", lesion_image(2002)]
    first, wrong, third = client.predict_batch(images, [METADATA, None, None])
    assert (first.context, wrong.error, third.context) == ("none", "unsupported_media_type", "image_only")
    triage = client.triage(images, "patient 1", institution="clinic")
    assert [lesion.rank for lesion in triage.lesions] == [1, 2] and triage.refused[0].index == 1
    shown = client.explain(images[0], view="map")
    assert shown.png.startswith(b"\x89PNG") and shown.model_version == "7" and shown.reasons == ()
    assert client.explain(blank_image()).reasons != ()
    abstained = client.predict(blank_image())
    assert abstained.abstained and abstained.risk is None and abstained.reasons


def test_the_log_is_read_and_erased(client, served):
    ids = [client.predict(lesion_image(2000 + n), patient_id="a/b c%2F").prediction_id for n in range(5)]
    other = client.predict(lesion_image(2010), patient_id="other").prediction_id
    found = [item.prediction_id for item in client.predictions(patient_id="a/b c%2F", limit=2)]
    assert found == ids[::-1]
    assert list(client.predictions(from_=moment(1), to=moment(2_000_000))) == []
    picture = client.image(ids[0])
    assert picture.media_type == "image/jpeg" and picture.data.startswith(b"\xff\xd8")
    report = client.erase_patient("a/b c%2F")
    assert report.counts["predictions"] == 5
    assert [item.prediction_id for item in client.predictions()] == [other]
    with pytest.raises(RefusedError, match="404"):
        client.prediction(ids[0])


def test_alarms_figures_and_the_way_to_a_new_model(client, served):
    client.predict(lesion_image(2000), METADATA)
    for name in ("first", "second", "third"):
        missed = PredictionRecord(id=name, model_version="7", context="none", risk=0.01, threshold=0.05)
        served.log.write([missed], {})
        client.label(name, "malignant")
    alarms = list(client.alarms(unacknowledged=True, kind="missed_cancer", limit=2))
    assert [alarm.id for alarm in alarms] == [3, 2, 1]
    assert client.acknowledge(2, "called in").detail["acknowledgement"] == "called in"
    assert [alarm.id for alarm in client.alarms(unacknowledged=True)] == [3, 1]
    assert client.summary(hours=1).predictions == 4
    record_candidate(served.log.store, "8", "a" * 64, {})
    record_candidate(served.log.store, "9", "b" * 64, {})
    assert client.reject("9", "takes scars for melanomas").rejected_by
    assert client.approve("8", "fewer missed").model_version == "8"
    assert client.candidates()[1].approvals[0].reason == "fewer missed"
    for version, previous in (("7", None), ("8", "7")):
        served.log.store.record_approval(version, "Ada", "", "promote", {"previous": previous})
    assert client.ask_rollback("8", "misses on site 4").model_version == "8"
    mark_candidate(served.log.store, "8", "a" * 64, "promoted")
    with pytest.raises(ConflictError, match="promoted already"):
        client.approve("8", "again")
    asked = client.retrain("new camera", "drift")
    assert client.retrain_request(asked.retrain_id).reason == "new camera"
    other = client.retrain("monthly", "schedule")
    listed = [request.retrain_id for request in client.retrain_requests(limit=1)]
    assert listed == [other.retrain_id, asked.retrain_id]
    assert client.model().classes == ["benign", "malignant"] and client.ready().status == "ok"


def test_the_async_client_on_the_real_routes(served):
    async def story():
        async with AsyncDermrayClient(served.url, trust_env=False) as client:
            answers = await asyncio.gather(*(client.predict(lesion_image(2000 + n), METADATA) for n in range(6)))
            logged = [item.prediction_id async for item in client.predictions(limit=4)]
            assert set(logged) == {answer.prediction_id for answer in answers}
            asked = [(await client.retrain("why", trigger)).retrain_id for trigger in ("manual", "drift")]
            assert [item.retrain_id async for item in client.retrain_requests(limit=1)] == asked[::-1]
            accepted = await client.submit(lesion_image(2100))
            assert (await client.wait_for_submission(accepted.submission_id)).state == "done"
            with pytest.raises(RefusedError, match="415"):
                await client.predict(b"no picture")

    asyncio.run(story())


def test_keys_open_what_their_role_may(local):
    _, key = create_api_key(local.log.store, "clinic", "caller", "admin")
    with http_server(local, require_keys=True) as url:
        with DermrayClient(url, key, trust_env=False) as client:
            assert client.predict(lesion_image(2001)).prediction_id
            with pytest.raises(RefusedError, match="403 forbidden"):
                client.candidates()
        with DermrayClient(url, "", trust_env=False) as client, pytest.raises(RefusedError, match="401 unauthorized"):
            client.predict(lesion_image(2001))
    assert [row["caller"] for row in local.rows()] == ["clinic"]
