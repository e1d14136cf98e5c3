"""Every answer names its request, and the log lines of every node that worked for it can be found by that name."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers

import numpy as np
import pytest
from ray.serve._private.http_util import _apply_middlewares
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve import request_ids
from serve.drift_logger import DriftLogger
from serve.front_door import http_middlewares
from serve.metadata_fusion import MetadataFusion
from serve.nodes import FusionNode, ScorerNode, SidecarNode
from serve.request_ids import (
    MAX_IDS,
    RequestIds,
    current_ids,
    join_ids,
    show_ids_in_log,
    watched_call,
    working_for,
)
from serve.sampling import flush_log
from serve.settings import ScorerSettings
from serve.shared_calls import SharedCalls
from tests.bundle_factory import LocalFusion, LocalScorer, lesion_image, served_bundle
from tests.local_service import LocalService
from tests.test_serve_drift_logger import entry
from tests.test_serve_nodes import Handle, Network, pictures

logger = logging.getLogger("ray.serve")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("ids") / "bundle")


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


@pytest.fixture
def served(reference, nodes, dermray_home):
    return LocalService(reference, dermray_home, nodes=nodes)


@pytest.fixture
def lines(caplog):
    """Lines of the log, as a node writes them."""
    show_ids_in_log()
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        yield lambda: [record.getMessage() for record in caplog.records]


GOOD = ["a1", "0af7651916cd43dd8448eb211c80319c", "Root=1-67891233-abcdef0123456789", "x" * 64, "a/b+c=:@._-"]
BAD = ["", "x" * 65, "a b", "a,b", "[a]", "a%sb", "a\tb", "\u00e9".encode(), b"\xff\xfe", "a;b", '"a"', "<a>", " "]


@pytest.mark.parametrize("given", GOOD)
def test_a_good_id_comes_back(served, given):
    assert served.client.get("/healthz", headers={"X-Request-ID": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", BAD)
def test_a_bad_id_is_replaced_by_a_new_one(served, given):
    first, second = (served.client.get("/healthz", headers={"X-Request-ID": given}) for _ in range(2))
    ids = [answer.headers["x-request-id"] for answer in (first, second)]
    assert first.status_code == 200
    assert all(len(made) == 32 and made.isalnum() for made in ids) and ids[0] != ids[1]


def test_of_two_ids_none_is_taken(served):
    answer = served.client.get("/healthz", headers=[("X-Request-ID", "a"), ("X-Request-ID", "b")])
    assert answer.headers["x-request-id"] not in ("a", "b")


def test_every_answer_has_an_id_also_an_error(served, monkeypatch):
    post = served.client.post

    def answered(response, status):
        assert response.status_code == status
        assert response.headers.get_list("x-request-id") == ["r1"]
        assert "request_id" not in response.json()

    named = {"X-Request-ID": "r1"}
    answered(post("/v1/predict", files={"image": ("x", lesion_image())}, headers=named), 200)
    answered(post("/v1/predict", files={"image": ("x", b"text")}, headers=named), 415)
    answered(post("/v1/predict", files={"image": ("x", bytes(30 * 2**20))}, headers=named), 413)
    answered(served.client.get("/nowhere", headers=named), 404)
    answered(served.client.delete("/v1/predict", headers=named), 405)

    async def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(served.service, "predict", fail)
    answered(post("/v1/predict", files={"image": ("x", lesion_image())}, headers=named), 500)
    # One that was made for a request without any.
    assert len(post("/v1/predict").headers["x-request-id"]) == 32


def test_serves_own_server_sees_logs_and_answers_the_id_that_was_accepted():
    """It takes any header for an id, decodes it as UTF-8 and appends it to the answer."""
    seen = {}

    async def endpoint(request):
        seen["route"] = request.headers["x-request-id"], current_ids()
        return PlainTextResponse("ok")

    inside = RequestIds(Starlette(routes=[Route("/", endpoint)]), answers=False)

    async def replica(scope, receive, send):
        seen["serve"] = dict(scope["headers"])[b"x-request-id"].decode("utf-8")
        await inside(scope, receive, send)

    client = TestClient(_apply_middlewares(replica, http_middlewares()))
    for given in ({"X-Request-ID": "good"}, {"X-Request-ID": b"\xff"}, {}):
        (answered,) = client.get("/", headers=given).headers.get_list("x-request-id")
        assert seen == {"serve": answered, "route": (answered, (answered,))}
    assert client.get("/", headers={"X-Request-ID": "good"}).headers["x-request-id"] == "good"


def test_lines_within_a_request_have_its_id_where_serve_prints_it(served, caplog):
    show_ids_in_log()
    served.sidecar.down = ConnectionError("away")
    served.client.get("/readyz", headers={"X-Request-ID": "probe-1"})
    (record,) = [record for record in caplog.records if "drift logger is not ready" in record.getMessage()]
    assert record.request_id == "probe-1"
    assert not record.getMessage().startswith("["), "Serve shows it already"


def test_lines_of_a_commit_have_the_ids_of_its_requests(served, lines):
    """The spool is where a record is looked for that came while the store was away."""
    served.sidecar.down = ConnectionError("away")
    files = {"image": ("x", lesion_image())}
    assert served.client.post("/v1/predict", files=files, headers={"X-Request-ID": "r1"}).status_code == 200
    (line,) = [line for line in lines() if "did not answer" in line]
    assert line.startswith("[requests r1] the drift logger did not answer (attempt 1)")


async def under(name, work):
    with working_for((name,), shared=False):
        return await work


def test_a_shared_call_works_for_all_its_requests_and_carries_their_ids():
    async def scenario():
        told = []

        class Told(Network):
            async def __call__(self, images, time_left_s, request_ids):
                told.append((len(images), request_ids))
                return await super().__call__(images, time_left_s)

        network = Told()
        network.gate.clear()
        node = ScorerNode(Handle(score=network), ScorerSettings(), retry_after_s=3)
        names = ["a", "b", "c"]
        tasks = [asyncio.create_task(under(names[0], node.score(pictures(1), 1e9)))]
        for _ in range(3):
            await asyncio.sleep(0)
        # A request with many pictures makes several calls; it is named once.
        for name in ("b", "c", "b"):
            tasks.append(asyncio.create_task(under(name, node.score(pictures(2, 3), 1e9))))
        for _ in range(3):
            await asyncio.sleep(0)
        network.gate.set()
        await asyncio.gather(*tasks)
        assert told == [(1, ("a",)), (6, ("b", "c"))]
        assert current_ids() == ()

    asyncio.run(scenario())


def test_calls_to_fusion_and_sidecar_carry_ids_too():
    async def scenario():
        told = {}

        def method(name, answer):
            async def call(*arguments):
                told[name] = arguments[-1]
                return answer

            return call

        handle = Handle(write=method("write", [None]), find=method("find", [None]), ping=method("ping", True))
        sidecar = SidecarNode(handle)
        await under("a", sidecar.write([entry(1)]))
        await under("b", sidecar.find("someone", ["key"]))
        fusion = Handle(fuse=method("fuse", None))
        fusion.fuse_patient, fusion.describe = (
            type(fusion.fuse)(method(name, {})) for name in ("fuse_patient", "describe")
        )
        node = FusionNode(fusion, retry_after_s=3)
        await under("c", node.fuse_patient(np.zeros((1, 2)), [{}], np.array([True])))
        await under("d", node.describe())
        with pytest.raises(AttributeError):
            await under("e", node.fuse(np.zeros((1, 2)), [{}]))
        assert told == {"write": ("a",), "find": ("b",), "fuse_patient": ("c",), "describe": ("d",), "fuse": ("e",)}

    asyncio.run(scenario())


def test_an_inner_nodes_failure_names_the_requests_of_the_call(reference, lines):
    async def scenario():
        fusion = MetadataFusion()
        await fusion.reconfigure(reference.model_dump())
        with pytest.raises((TypeError, AttributeError)):
            await fusion.fuse(np.zeros((2, 2), np.float32), [3, 4], ("r1", "r2"))

    asyncio.run(scenario())
    (line,) = [line for line in lines() if "fuse" in line]
    assert line.startswith("[requests r1,r2] fuse of 2 failed after ")


def test_what_the_sidecar_refuses_names_the_requests_of_the_call(dermray_home, lines, monkeypatch):
    async def scenario():
        places = {"store_url": f"sqlite:///{dermray_home}/s.db", "images_url": str(dermray_home / "i")}
        sidecar = DriftLogger(places | {"spool_dir": str(dermray_home / "p"), "patient_key_file": "/none"})
        monkeypatch.setattr(sidecar._logic, "commit", lambda entries: [ValueError("no"), None])
        results = await sidecar.write([entry(1), entry(2)], ("r1", "r2"))
        assert isinstance(results[0], RuntimeError) and results[1] is None
        await sidecar._sampler.stop()

    asyncio.run(scenario())
    assert "[requests r1,r2] the store refused an entry: no" in lines()


def test_a_slow_call_is_a_line_and_a_quick_one_is_none(monkeypatch, lines):
    with watched_call("score", 5, ("r1",)):
        pass
    assert lines() == []
    monkeypatch.setattr(request_ids, "SLOW_CALL_S", -1.0)
    with watched_call("score", 5, ("r1", "r2")):
        pass
    (line,) = lines()
    assert line.startswith("[requests r1,r2] slow: score of 5 took ")


def test_a_line_names_a_bounded_number_of_requests():
    ids = [(f"r{number}",) for number in range(MAX_IDS + 10)]
    joined = join_ids(ids)
    assert joined[:MAX_IDS] == tuple(name for (name,) in ids[:MAX_IDS]) and joined[MAX_IDS:] == ("...",)
    # Joined again, as the sidecar does with the calls of several ingress replicas.
    assert join_ids([joined[-3:], ("z",), ("z",)]) == (*joined[-3:-1], "z", "...")
    assert join_ids([]) == ()


def test_work_outside_of_requests_has_no_id(lines):
    async def call(items):
        logger.warning("at work")
        return items

    asyncio.run(SharedCalls(call, size=lambda item: 1).submit(1))
    assert lines() == ["at work"]


def test_lines_that_serves_logger_holds_back_come_out(tmp_path, monkeypatch):
    """In throughput mode it keeps 1000 of them below ERROR."""
    file = logging.FileHandler(tmp_path / "replica.log")
    monkeypatch.setattr(logger, "handlers", [logging.handlers.MemoryHandler(1000, logging.ERROR, file)])
    logger.warning("the spool waits")
    assert (tmp_path / "replica.log").read_text() == ""
    flush_log()
    assert (tmp_path / "replica.log").read_text() == "the spool waits\n"
    file.close()
