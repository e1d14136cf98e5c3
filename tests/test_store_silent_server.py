"""A database that takes connections and never answers costs a bounded wait, and not what does not need it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import sqlalchemy as sql

from monitoring.prediction_log import PredictionLog
from serve.access import Caller
from serve.drift_logger import DriftLogger, open_log
from serve.durable_log import DurableLog
from serve.errors import ApiError
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.served_model import ServedModel
from serve.settings import DriftLoggerSettings
from serve.store_calls import StoreCalls
from store import connection
from store.api_keys import list_api_keys
from store.database import StoreUnavailableError, open_store
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    backend,
    lesion_image,
    prediction_service,
    served_bundle,
    storage,
)

pytestmark = pytest.mark.slow

# The least that libpq takes.
CONNECT_S = 2


@pytest.fixture
def silent() -> Iterator[str]:
    """URL of a server that accepts and says nothing: the kernel completes connections that nobody takes."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield f"postgresql://dermray@127.0.0.1:{server.getsockname()[1]}/store"


@pytest.fixture
def quicker(silent) -> str:
    """The same, given up after the time that its URL says."""
    return f"{silent}?connect_timeout={CONNECT_S}"


def test_a_server_that_never_answers_is_given_up_within_the_bound(silent):
    start = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="cannot be opened"):
        open_store(silent)
    assert time.monotonic() - start < connection._POSTGRESQL["connect_timeout"] + 3


def test_threads_that_ask_while_it_is_opened_do_not_wait_one_after_the_other(quicker, tmp_path):
    log = PredictionLog(quicker, str(tmp_path), str(tmp_path))
    barrier = threading.Barrier(8)

    def ask() -> float:
        barrier.wait(10)
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            assert log.store
        return time.monotonic() - start

    with ThreadPoolExecutor(8) as threads:
        assert max(future.result() for future in [threads.submit(ask) for _ in range(8)]) < 2 * CONNECT_S
    # The next one tries again.
    log.store_url = f"sqlite:///{tmp_path}/store.db"
    assert log.store is log.store
    log.store.close()


def test_a_call_that_gets_no_thread_is_answered_all_the_same(tmp_path):
    log = PredictionLog(f"sqlite:///{tmp_path}/store.db", str(tmp_path), str(tmp_path))
    release = threading.Event()

    async def story():
        calls = StoreCalls(log, 7, "stuck", threads=1, timeout_s=0.5)
        answers = await asyncio.gather(*(calls(lambda _: release.wait(30)) for _ in range(3)), return_exceptions=True)
        assert [(answer.status, answer.retry_after_s) for answer in answers] == [(503, 7)] * 3
        release.set()
        assert await StoreCalls(log, 7, "free")(lambda store: store.url) == log.store.url

    asyncio.run(story())
    log.store.close()


def test_a_full_pool_is_a_store_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_POOL_TIMEOUT_S", 0.1)
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    held = [store.engine.connect() for _ in range(15)]
    try:
        with pytest.raises(StoreUnavailableError, match="every connection is in use"), store.reading():
            pass
        with pytest.raises(StoreUnavailableError, match="every connection is in use"), store.writing():
            pass
    finally:
        for one in held:
            one.close()
        store.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("silent") / "bundle", version="7")


def test_predictions_are_spooled_and_answered_while_every_other_use_of_the_store_hangs(
    reference, dermray_home, quicker
):
    places = storage(dermray_home).model_copy(update={"store_url": quicker})
    settings = DriftLoggerSettings(attempts=1, attempt_timeout_s=0.5, replay_interval_s=0.05)

    async def story():
        # As many on every machine.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        log = open_log(places)
        durable = DurableLog(DriftLogger(places.model_dump()), log, settings)
        service = prediction_service((LocalScorer(reference), LocalFusion(reference)), durable)
        service.use_model(ServedModel.load(reference))
        keys = KeyRing(lambda: list_api_keys(log.store, live_only=True), 0.01)
        started = asyncio.create_task(keys.start())
        api = build_api(backend(service, log, retry_after_s=1))

        async def with_caller(scope, receive, send):
            await api({**scope, "dermray.caller": Caller("clinic", "admin")}, receive, send)

        transport = httpx.ASGITransport(with_caller, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60) as client:
            picture = {"image": ("x", lesion_image())}
            others = [asyncio.create_task(client.post("/v1/submissions", files=picture)) for _ in range(8)]
            others += [
                asyncio.create_task(client.get(path))
                for path in ("/v1/predictions", "/v1/candidates", "/v1/alarms")
                for _ in range(3)
            ]
            await asyncio.sleep(0)
            for _ in range(5):
                start = time.monotonic()
                answer = await client.post("/v1/predict", files=picture)
                assert answer.status_code == 200, answer.text
                assert time.monotonic() - start < settings.attempt_timeout_s + 1.5
            assert not any(task.done() for task in others), "the store calls hang meanwhile"
            assert log.spool.pending() == 5
            for response in await asyncio.gather(*others):
                assert response.status_code == 503 and response.headers["Retry-After"] == "1", response.text
                assert response.json()["detail"] == "the store does not answer; send the same request again"
        await started
        assert keys.state == "never read"
        for task in (keys._task, durable._replay_task):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())


@pytest.mark.postgres
def test_a_statement_that_waits_too_long_is_ended_by_the_server(postgres_url, monkeypatch):
    short = {**connection._POSTGRESQL, "options": connection._POSTGRESQL["options"].replace("=15000", "=300")}
    monkeypatch.setattr(connection, "_POSTGRESQL", short)
    store = open_store(postgres_url)
    start = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="statement timeout"), store.reading() as reader:
        reader.execute(sql.text("SELECT pg_sleep(20)"))
    assert time.monotonic() - start < 10
    with store.reading() as reader:
        assert reader.execute(sql.text("SHOW idle_in_transaction_session_timeout")).scalar_one() == "1min"
    store.close()


@pytest.mark.postgres
def test_what_the_url_says_of_a_connection_holds(postgres_url):
    store = open_store(f"{postgres_url}&options=-c%20statement_timeout%3D1234")
    with store.reading() as reader:
        assert reader.execute(sql.text("SHOW statement_timeout")).scalar_one() == "1234ms"
    store.close()


def test_a_503_of_the_store_is_an_api_error(tmp_path, quicker):
    async def story():
        with pytest.raises(ApiError) as raised:
            await StoreCalls(PredictionLog(quicker, str(tmp_path), str(tmp_path)), 3, "one")(list)
        assert (raised.value.status, raised.value.retry_after_s) == (503, 3)

    asyncio.run(story())
