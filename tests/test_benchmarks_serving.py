"""The load generator counts what came back, against a real plain server; the benchmark has the agreed keys."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.load_generator import LoadGenerator, http_request
from benchmarks.serving import closed_loops, form, generator, missing_or_repeated, read_images
from benchmarks.serving_variants import peer
from modeling.preprocessing import decode_image
from store.database import open_store
from tests.bundle_factory import served_bundle
from tests.log_rows import prediction_row


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    bundle = served_bundle(tmp_path_factory.mktemp("benchmark") / "bundle")
    with peer("fastapi_ort", bundle.bundle_uri) as server:
        yield server


def test_a_closed_loop_counts_answers_and_errors_and_its_percentiles_are_ordered(variant):
    images = read_images(None)[:10]
    tally = asyncio.run(generator(variant.url, images).closed_loop(4, requests=40))
    figures = tally.figures()
    assert (tally.answered, tally.errors) == (40, 0) and figures["rps"] > 0
    assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
    # A picture that the server cannot decode is an error of the run, not a fast answer.
    mixed = asyncio.run(generator(variant.url, [images[0], b"no picture"]).closed_loop(2, requests=20))
    assert (mixed.answered, mixed.errors) == (10, 10)


def test_an_open_loop_sends_at_its_rate_whatever_the_answers_take(variant):
    tally = asyncio.run(generator(variant.url, read_images(None)[:4]).open_loop(40, 2.0))
    assert tally.answered == 80 and tally.errors == 0


async def scripted(answers: list[bytes]) -> tuple[asyncio.Server, str]:
    """A server that gives these answers in turn, then closes every connection."""
    left = list(answers)

    async def serve(reader, writer):
        while left:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(left.pop(0))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def answer(status: str, body: bytes = b"", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body


def test_refusals_breaks_and_ids_are_told_apart():
    name = "0123456789abcdef" * 2

    async def scenario():
        server, url = await scripted(
            [
                answer("200 OK", f'{{"prediction_id":"{name}","risk":0.5}}'.encode()),
                answer("503 Service Unavailable", b"{}", "retry-after: 1\r\n"),
                answer("503 Service Unavailable", b"{}"),
                answer("500 Internal Server Error", b"{}"),
            ]
        )
        async with server:
            load = LoadGenerator(url, [http_request(url, "/v1/predict", form([b"x"], "image"), "text/plain")])
            return await load.closed_loop(1, requests=5)

    tally = asyncio.run(scenario())
    assert dict(tally.statuses) == {200: 1, 503: 2, 500: 1, 0: 1}
    # A 503 without Retry-After is no orderly refusal.
    assert (tally.answered, tally.refused, tally.errors) == (1, 1, 3)
    assert tally.prediction_ids == [name]


def test_the_result_has_the_agreed_keys_and_cpu_time_is_counted(variant):
    result, ids = closed_loops({"fastapi_ort": variant}, read_images(None)[:4], [1, 2], seconds=0.5, rounds=1)
    assert set(result) == {"fastapi_ort"} and set(result["fastapi_ort"]) == {"1", "2"} and ids == []
    for figures in result["fastapi_ort"].values():
        assert {"rps", "p50_ms", "p95_ms", "p99_ms", "errors", "cpu_ms.fastapi_ort"} <= set(figures)
        assert figures["cpu_ms"] > 0


def test_lost_and_repeated_predictions_are_found(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    store.insert_predictions([prediction_row("a"), prediction_row("b")])
    store.close()
    assert missing_or_repeated(tmp_path, ["a"]) == {"answered": 1, "missing": 0, "repeated": 0}
    assert missing_or_repeated(tmp_path, ["a", "a", "c"]) == {"answered": 2, "missing": 1, "repeated": 1}


def test_no_picture_is_sent_twice():
    images = read_images(None)[:2]
    load = generator("http://127.0.0.1:1", images)
    sent = [load._take() for _ in range(300)]
    assert len(set(sent)) == 300
    for request, image in zip(sent, [images[1], images[0]] * 150, strict=True):
        start = request.index(b"\xff\xd8")
        picture, original = decode_image(request[start : start + len(image)]), decode_image(image)
        assert picture.shape == original.shape
        assert np.abs(picture.astype(int) - original).mean() < 3
