"""The load generator counts what it sent, against a real plain server."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.serving import closed_loop, measure, plain_server, read_images
from tests.bundle_factory import served_bundle


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    bundle = served_bundle(tmp_path_factory.mktemp("benchmark") / "bundle")
    with plain_server(bundle.bundle_uri) as address:
        yield address


def test_a_closed_loop_counts_answers_and_errors_and_its_percentiles_are_ordered(url):
    images = read_images(None)[:10]
    figures = asyncio.run(closed_loop(url, images, clients=4, requests=40))
    assert figures["errors"] == 0 and figures["rps"] > 0
    assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
    # A picture that the server cannot decode is an error of the run, not a fast answer.
    mixed = asyncio.run(closed_loop(url, [images[0], b"no picture"], clients=2, requests=20))
    assert mixed["errors"] == 10


def test_the_result_has_the_agreed_keys(url):
    result = measure({"fastapi_ort": url}, read_images(None)[:4], clients=[1, 2], requests=20, rounds=1)
    assert set(result) == {"fastapi_ort"} and set(result["fastapi_ort"]) == {"1", "2"}
    for figures in result["fastapi_ort"].values():
        assert {"rps", "p50_ms", "p95_ms", "p99_ms", "errors"} <= set(figures)
