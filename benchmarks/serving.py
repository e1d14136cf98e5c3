"""The service with its durable log beside plain servers of the same network: rates, latencies, CPU time, overload.

    python -m benchmarks.serving --bundle DIR [--images FILE.hdf5] [--clients 1,8,32,100,300] [--seconds 8] [--rounds 3]

Rounds alternate between the variants; medians are printed as one JSON line last. Closed loop: each client sends its
next request when the last is answered. Then, for the service alone: an open loop at twice its rate of 32 clients, 300
users for a minute, and requests of 64 pictures beside the engine's own rate. What was answered with 200 must be in the
store, once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import psutil

from benchmarks.load_generator import LoadGenerator, Tally, http_request, run_on_uvloop
from benchmarks.serving_peers import KINDS
from benchmarks.serving_variants import Variant, own_service, peer, replica_name
from data_pipelines.hdf5_index import build_index
from data_pipelines.image_reader import ImageReader
from data_pipelines.synthetic_lesions import encode_jpeg, parity_images
from modeling.bundle import load_bundle
from modeling.engines import create_engine
from store.database import open_store

NUM_IMAGES = 200
TILE_PIXELS = 133
BULK_IMAGES = 64
_BOUNDARY = secrets.token_hex(16)
_CONTENT_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"


def read_images(path: str | None) -> list[bytes]:
    """Encoded pictures to send: of an HDF5 file, or synthetic tiles of the usual size."""
    if path is None:
        return [encode_jpeg(image) for image in parity_images(TILE_PIXELS, seed=0, count=NUM_IMAGES)]
    index = build_index(path)
    chosen = np.random.default_rng(0).permutation(len(index.ids))[:NUM_IMAGES]
    with ImageReader(path) as reader:
        return [reader.read(str(index.ids[i]), int(index.offset[i]), int(index.size[i])) for i in chosen]


def form(images: list[bytes], name: str, fields: dict[str, str] | None = None) -> bytes:
    """A multipart form with these pictures under one name."""
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'.encode()
        for field, value in (fields or {}).items()
    ]
    for image in images:
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.jpg"\r\n\r\n'
        parts.append(head.encode() + image + b"\r\n")
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()


def generator(url: str, images: list[bytes]) -> LoadGenerator:
    """Sends one picture a request to /v1/predict."""
    return LoadGenerator(
        url, [http_request(url, "/v1/predict", form([image], "image"), _CONTENT_TYPE) for image in images]
    )


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def measured(variant: Variant, run: Callable[[], Tally]) -> tuple[dict[str, float], Tally]:
    """A measurement's figures, with the milliseconds of CPU per answer by part of the server."""
    before = variant.cpu_seconds()
    tally = run()
    spent = variant.cpu_seconds() - before
    answered = max(tally.answered, 1)
    parts = {f"cpu_ms.{part}": 1e3 * seconds / answered for part, seconds in spent.items()}
    return tally.figures() | {"cpu_ms": 1e3 * sum(spent.values()) / answered} | parts, tally


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each figure over the rounds; counts are added up."""
    names = sorted({name for row in rows for name in row})
    found = {name: round(statistics.median(row.get(name, 0.0) for row in rows), 2) for name in names}
    return found | {name: sum(int(row[name]) for row in rows) for name in ("errors", "refused")}


def closed_loops(
    variants: dict[str, Variant], images: list[bytes], clients: list[int], seconds: float, rounds: int
) -> tuple[dict[str, dict[str, dict[str, float]]], list[str]]:
    """variant -> clients -> figures, and the ids of all predictions that our own service answered."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    ids: list[str] = []
    for round_number in range(rounds + 1):
        for number in clients:
            for name, variant in variants.items():
                load = generator(variant.url, images)
                figures, tally = measured(
                    variant, lambda load=load, n=number: run_on_uvloop(lambda: load.closed_loop(n, seconds=seconds))
                )
                ids += tally.prediction_ids
                # The first round warms up: connections, allocators, autoscaling.
                if round_number > 0:
                    found.setdefault((name, number), []).append(figures)
                say(
                    f"round {round_number} {name}, {number} clients: {figures['rps']:.0f} requests/s, "
                    f"p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.0f} ms, CPU {figures['cpu_ms']:.1f} ms, "
                    f"{tally.refused} refused, {tally.errors} errors"
                )
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (name, number), rows in found.items():
        result.setdefault(name, {})[str(number)] = medians(rows)
    return result, ids


def overload(
    variant: Variant, images: list[bytes], clients: int, users: int, seconds: float, rounds: int
) -> tuple[dict, list[str]]:
    """Rounds of a closed loop and then an open loop at twice its rate; at last `users` that never wait, with the
    replicas' memory before and after."""
    load = generator(variant.url, images)
    ids: list[str] = []

    def run(make: Callable[[], Awaitable[Tally]]) -> dict[str, float]:
        figures, tally = measured(variant, lambda: run_on_uvloop(make))
        ids.extend(tally.prediction_ids)
        return figures

    rows = []
    for round_number in range(1, rounds + 1):
        rate = run(lambda: load.closed_loop(clients, seconds=seconds / 6))["rps"]
        figures = run(lambda rate=rate: load.open_loop(2 * rate, seconds / 3))
        rows.append(figures | {"offered_rps": 2 * rate, "goodput": figures["rps"] / rate})
        say(
            f"overload round {round_number}: {rate:.0f}/s with {clients} clients; of {2 * rate:.0f}/s offered "
            f"{figures['rps']:.0f} answered, {rows[-1]['goodput']:.2f} of that rate, p99 {figures['p99_ms']:.0f} ms"
        )
    run(lambda: load.closed_loop(users, seconds=seconds / 6))
    memory = [replica_megabytes()]
    figures = run(lambda: load.closed_loop(users, seconds=seconds))
    memory.append(replica_megabytes())
    say(
        f"{users} users: answered {figures['rps']:.0f}/s, {figures['refused']} refused, {figures['errors']} errors, "
        f"memory {memory} MB"
    )
    return {"open_loop": medians(rows), f"{users}_users": figures, "replica_mb": memory}, ids


def replica_megabytes() -> int:
    """Resident memory of all Serve replicas on this host."""
    total = 0
    for process in psutil.process_iter():
        if replica_name(process) is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return round(total / 2**20)


def bulk(variant: Variant, bundle_uri: str, images: list[bytes], rounds: int) -> dict[str, float]:
    """Pictures a second of requests with 64 of them, beside the engine alone at its best batch size."""
    bundle = load_bundle(bundle_uri)
    engine = create_engine(bundle)
    size = bundle.manifest.input_size
    batch = np.random.default_rng(0).integers(0, 256, (BULK_IMAGES, size, size, 3), dtype=np.uint8)
    routes = {"/v1/predict/batch": {}}
    if "patient" in bundle.contexts:
        routes["/v1/patients/triage"] = {"patient_id": "benchmark"}
    loads = {
        path: LoadGenerator(
            variant.url,
            [http_request(variant.url, path, form(images[:BULK_IMAGES], "images", fields), _CONTENT_TYPE)],
        )
        for path, fields in routes.items()
    }
    rates: dict[str, list[float]] = {}
    for round_number in range(2 * rounds + 1):
        for chunk in (8, 16, 32):
            started = time.perf_counter()
            for start in range(0, BULK_IMAGES, chunk):
                engine.run(batch[start : start + chunk])
            rates.setdefault(f"engine_batch_{chunk}", []).append(BULK_IMAGES / (time.perf_counter() - started))
        for path, load in loads.items():
            tally = asyncio.run(load.closed_loop(1, requests=3))
            if tally.answered != 3:
                raise RuntimeError(f"{path} answered {dict(tally.statuses)}")
            rates.setdefault(path, []).append(3 * BULK_IMAGES / tally.seconds)
        if round_number == 0:
            rates.clear()
    found = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    best = max(value for name, value in found.items() if name.startswith("engine"))
    return found | {f"{path} over engine": round(found[path] / best, 3) for path in loads}


def missing_or_repeated(home: Path, ids: list[str]) -> dict[str, int]:
    """How many answered predictions are not in the store, and how many ids were answered or stored twice."""
    store = open_store(f"sqlite:///{home}/store.db", create=False)
    stored = Counter(row["id"] for row in store.predictions_between(0, 2**62))
    store.close()
    answered = Counter(ids)
    return {
        "answered": len(answered),
        "missing": sum(name not in stored for name in answered),
        "repeated": sum(count > 1 for count in (*stored.values(), *answered.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, help="model bundle that all variants but fastapi_eager run")
    parser.add_argument("--images", help="ISIC-layout HDF5 file; default: synthetic tiles")
    parser.add_argument("--clients", default="1,8,32,100,300")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(KINDS), help="which to run beside the service")
    parser.add_argument(
        "--overload-seconds",
        type=float,
        default=60.0,
        help="of the 300 users, and a third of it of each open loop; 0 leaves overload out",
    )
    parser.add_argument("--deploy", default="", help="more flags for deploy_service, separated by spaces")
    arguments = parser.parse_args()
    images = read_images(arguments.images)
    clients = [int(number) for number in arguments.clients.split(",")]
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(own_service(arguments.bundle, arguments.deploy.split()))
        variants = {"dermray": own}
        for kind in filter(None, arguments.peers.split(",")):
            variants[kind] = stack.enter_context(peer(kind, arguments.bundle))
        gc.disable()  # of the generator: its pauses would be counted as the servers'
        result, ids = closed_loops(variants, images, clients, arguments.seconds, arguments.rounds)
        extra: dict[str, object] = {"bulk": bulk(own, arguments.bundle, images, arguments.rounds)}
        say(f"64 pictures a request: {extra['bulk']}")
        if arguments.overload_seconds:
            extra["overload"], more = overload(own, images, 32, 300, arguments.overload_seconds, arguments.rounds)
            ids += more
        assert own.home is not None
        extra["store"] = missing_or_repeated(own.home, ids)
        say(f"store: {extra['store']}")
    print(json.dumps({"cores": os.cpu_count(), "rounds": arguments.rounds, **result, **extra}))


if __name__ == "__main__":
    main()
