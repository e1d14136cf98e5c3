"""Kills each node of the service in turn, under load, and times how long it is missed.

    python -m benchmarks.recovery --bundle DIR [--clients 16]

For each node: requests that failed, the longest time without an answer, seconds until every node is ready again, and
whether an answered prediction is missing from the store. One JSON object last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import time

import aiohttp
import psutil

from benchmarks.load_generator import LoadGenerator, Tally
from benchmarks.serving import generator, missing_or_repeated, read_images, say
from benchmarks.serving_variants import Variant, own_service, replica_name

NODES = ("Ingress", "ImageScorer", "MetadataFusion", "DriftLogger")
BEFORE_S, AFTER_S, TIMEOUT_S = 4.0, 4.0, 120.0


def pids(node: str) -> set[int]:
    """Process ids of a node's live replicas on this host."""
    return {process.pid for process in psutil.process_iter(["cmdline"]) if replica_name(process) == node}


async def ready(url: str) -> bool:
    """Whether every node answers, and nothing waits in the spool."""
    try:
        async with (
            aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"{url}/readyz") as response,
        ):
            checks = (await response.json()).get("checks", {})
            return response.status == 200 and set(checks.values()) == {"ok"}
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False


async def kill_under_load(variant: Variant, load: LoadGenerator, node: str, clients: int) -> tuple[dict, Tally]:
    """Kills all replicas of a node with SIGKILL while users send requests."""
    stop = asyncio.Event()
    users = asyncio.create_task(load.closed_loop(clients, until=stop))
    await asyncio.sleep(BEFORE_S)
    victims = pids(node)
    killed = time.perf_counter()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    while not (pids(node) - victims and await ready(variant.url)):
        if time.perf_counter() - killed > TIMEOUT_S:
            raise RuntimeError(f"{node} was not back in {TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.1)
    back = time.perf_counter() - killed
    await asyncio.sleep(AFTER_S)
    stop.set()
    tally = await users
    pauses = [later - earlier for earlier, later in itertools.pairwise(sorted(tally.answered_at))]
    figures = {
        "answered": tally.answered,
        "failed": tally.errors,
        "refused": tally.refused,
        "longest_pause_s": round(max(pauses), 2),
        "ready_again_s": round(back, 2),
    }
    return figures, tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--deploy", default="", help="more flags for deploy_service, separated by spaces")
    arguments = parser.parse_args()
    images = read_images(None)
    result: dict[str, dict] = {}
    with own_service(arguments.bundle, arguments.deploy.split()) as variant:
        assert variant.home is not None
        for node in NODES:
            load = generator(variant.url, images)
            figures, tally = asyncio.run(kill_under_load(variant, load, node, arguments.clients))
            result[node] = figures | missing_or_repeated(variant.home, tally.prediction_ids)
            say(f"{node}: {result[node]}")
    print(json.dumps({"cores": os.cpu_count(), "clients": arguments.clients, **result}))


if __name__ == "__main__":
    main()
