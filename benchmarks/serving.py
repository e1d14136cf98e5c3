"""Requests/s and latency of the service in a closed loop, beside a plain FastAPI + ONNX Runtime process.

    python -m benchmarks.serving --bundle DIR [--images FILE.hdf5] [--clients 1,8,32] [--requests 400] [--rounds 3]
    python -m benchmarks.serving --url http://127.0.0.1:8000 [--bundle DIR] ...

Without --url the service is deployed on a cluster of its own, with its durable log on. Every client sends its next
request when the last is answered. Rounds alternate between the variants; medians are printed as one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np

from data_pipelines.hdf5_index import build_index
from data_pipelines.image_reader import ImageReader
from data_pipelines.synthetic_lesions import encode_jpeg, parity_images
from local.cluster import LocalCluster
from local.jobs import parse_result

NUM_IMAGES = 200
TILE_PIXELS = 133
START_TIMEOUT_S = 120.0


def read_images(path: str | None) -> list[bytes]:
    """Encoded pictures to send: of an HDF5 file, or synthetic tiles of the usual size."""
    if path is None:
        return [encode_jpeg(image) for image in parity_images(TILE_PIXELS, seed=0, count=NUM_IMAGES)]
    index = build_index(path)
    chosen = np.random.default_rng(0).permutation(len(index.ids))[:NUM_IMAGES]
    with ImageReader(path) as reader:
        return [reader.read(str(index.ids[i]), int(index.offset[i]), int(index.size[i])) for i in chosen]


def request_body(image: bytes, boundary: str) -> bytes:
    """A multipart form with one file, made once: the load generator shares the cores with the server."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    return head.encode() + image + f"\r\n--{boundary}--\r\n".encode()


async def closed_loop(url: str, images: list[bytes], clients: int, requests: int) -> dict[str, float]:
    """Sends `requests` requests with `clients` clients.

    Returns:
        rps: answers with 200 a second; p50_ms, p95_ms, p99_ms of these; errors: all other answers.
    """
    boundary = secrets.token_hex(16)
    bodies = [request_body(image, boundary) for image in images]
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    numbers = iter(range(requests))
    latencies: list[float] = []
    errors = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal errors
        for number in numbers:
            started = time.perf_counter()
            try:
                async with session.post(
                    f"{url}/v1/predict", data=bodies[number % len(bodies)], headers=headers
                ) as response:
                    await response.read()
                    ok = response.status == 200
            except aiohttp.ClientError:
                ok = False
            if ok:
                latencies.append(1e3 * (time.perf_counter() - started))
            else:
                errors += 1

    connector = aiohttp.TCPConnector(limit=clients)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - started
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) if latencies else (float("nan"),) * 3
    return {"rps": len(latencies) / seconds, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "errors": errors}


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns once something listens behind the URL."""
    host, port = url.removeprefix("http://").split(":")
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server behind {url} did not start")
        time.sleep(0.1)


@contextlib.contextmanager
def plain_server(bundle: str) -> Iterator[str]:
    """A FastAPI + ONNX Runtime process; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serving_peers", "--bundle", bundle, "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def own_service(bundle: str, flags: list[str]) -> Iterator[str]:
    """The service on a cluster of its own, with an empty home; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="dermray-benchmark-") as home, LocalCluster(Path(home)) as cluster:
        command = [sys.executable, "-m", "ray_jobs.deploy_service", "--bundle", str(Path(bundle).absolute())]
        command += ["--port", str(cluster.http_port), *flags]
        environment = {**os.environ, **cluster.client_environment(), "DERMRAY_HOME": home}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        yield parse_result(done.stdout)["url"]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(urls: dict[str, str], images: list[bytes], clients: list[int], requests: int, rounds: int) -> dict:
    """Medians over alternating rounds: variant -> clients -> figures."""
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    for round_number in range(rounds + 1):
        for number in clients:
            for variant, url in urls.items():
                count = max(requests // 4, 20) if number == 1 else requests
                figures = asyncio.run(closed_loop(url, images, number, count))
                # The first round warms up: connections, allocators, autoscaling.
                if round_number > 0:
                    measured.setdefault((variant, number), []).append(figures)
                _say(f"round {round_number} {variant} {number} clients: {figures['rps']:.0f} requests/s")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (variant, number), rows in measured.items():
        medians = {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}
        result.setdefault(variant, {})[str(number)] = medians | {"errors": sum(int(row["errors"]) for row in rows)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running service; default: deploy one")
    parser.add_argument("--bundle", help="model bundle, for the own service and the plain server")
    parser.add_argument("--images", help="ISIC-layout HDF5 file; default: synthetic tiles")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=400, help="requests of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deploy", default="", help="more flags for deploy_service, separated by spaces")
    arguments = parser.parse_args()
    if arguments.url is None and arguments.bundle is None:
        parser.error("give --url, --bundle or both")
    images = read_images(arguments.images)
    with contextlib.ExitStack() as stack:
        urls = {"dermray": arguments.url}
        if arguments.url is None:
            urls["dermray"] = stack.enter_context(own_service(arguments.bundle, arguments.deploy.split()))
        if arguments.bundle is not None:
            urls["fastapi_ort"] = stack.enter_context(plain_server(arguments.bundle))
        clients = [int(number) for number in arguments.clients.split(",")]
        result = measure(urls, images, clients, arguments.requests, arguments.rounds)
    print(json.dumps({"cores": os.cpu_count(), "rounds": arguments.rounds, **result}))


if __name__ == "__main__":
    main()
