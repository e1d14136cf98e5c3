"""The image scorer follows the load: from one replica to two and back, and from none when the service was idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from local.jobs import run_job_on
from tests.bundle_factory import lesion_image, served_bundle
from tests.test_serve_app import replicas, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def deploy(ray_connected, tmp_path_factory) -> Iterator[Callable[..., str]]:
    home = tmp_path_factory.mktemp("scaling") / "home"
    home.mkdir()
    bundle = served_bundle(home / "bundle")

    def run(*flags: str) -> str:
        arguments = ["--bundle", bundle.bundle_uri, "--port", str(ray_connected.http_port)]
        name = f"deploy-{time.time_ns()}"
        environment = ray_connected.client_environment()
        return run_job_on(environment, home, "deploy_service", [*arguments, *flags], name)["url"]

    yield run
    from ray import serve

    serve.shutdown()


@contextmanager
def load(url: str, clients: int) -> Iterator[list[int]]:
    """Statuses of requests that `clients` users send while the block runs."""
    statuses: list[int] = []
    stop = threading.Event()

    def send() -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not stop.is_set():
                response = client.post(f"{url}/v1/predict", files={"image": ("x", lesion_image(len(statuses)))})
                statuses.append(response.status_code)

    with ThreadPoolExecutor(clients) as pool:
        users = [pool.submit(send) for _ in range(clients)]
        try:
            yield statuses
        finally:
            stop.set()
        for user in users:
            user.result(timeout=90)


def test_the_scorer_grows_under_load_and_shrinks_after_it_without_an_error(deploy):
    flags = ["--scorer.min-replicas", "1", "--scorer.max-replicas", "2", "--scorer.target-ongoing-requests", "0.05"]
    url = deploy(*flags, "--scorer.upscale-delay-s", "1", "--scorer.downscale-delay-s", "3")
    wait_for(lambda: len(replicas("ImageScorer")) == 1, "one scorer")
    with load(url, 12) as statuses:
        wait_for(lambda: len(replicas("ImageScorer")) == 2, "a second scorer", 120)
    assert statuses and set(statuses) == {200}
    wait_for(lambda: len(replicas("ImageScorer")) == 1, "one scorer again", 120)


def test_an_idle_service_has_no_scorer_and_the_next_request_brings_one(deploy):
    url = deploy("--scorer.min-replicas", "0", "--scorer.upscale-delay-s", "0", "--scorer.downscale-delay-s", "2")
    wait_for(lambda: not replicas("ImageScorer"), "no scorer", 120)
    with httpx.Client(timeout=60, trust_env=False) as client:
        response = client.post(f"{url}/v1/predict", files={"image": ("x", lesion_image())})
    assert response.status_code == 200, response.text
    assert len(replicas("ImageScorer")) == 1
