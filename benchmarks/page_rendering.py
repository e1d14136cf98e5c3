"""How long the service takes for each page, and how many bytes it sends, beside a log that grows.

python -m benchmarks.page_rendering --url http://127.0.0.1:8000 --store-url sqlite:////var/demo/store.db --rows 0,100000

The service asks for no keys, and its store is written to: predictions of the last 30 days are added until there are so
many. Scripts, style sheets and pictures are requests of their own and are not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import httpx
import numpy as np
import sqlalchemy as sql

from store.database import Store, open_store
from store.tables import now_us, predictions

PAGES = ("/", "/review", "/review/label-studio", "/monitoring", "/models", "/about")
_DAY_US = 86_400_000_000
_BATCH = 5_000


def fill(store: Store, number: int, version: str) -> None:
    """Adds predictions of a model, spread over 30 days, until the log has so many."""
    with store.reading() as connection:
        there = connection.execute(sql.select(sql.func.count()).select_from(predictions)).scalar_one()
    missing, now = max(0, number - there), now_us()
    rng = np.random.default_rng(0)
    for start in range(0, missing, _BATCH):
        store.insert_predictions([_row(rng, now, f"fill-{there + start + at}", version) for at in range(_BATCH)])
        print(f"{min(start + _BATCH, missing)} of {missing} rows added", flush=True)


def _row(rng: np.random.Generator, now: int, name: str, version: str) -> dict:
    risk = float(rng.beta(0.3, 6))
    return {
        "id": name,
        "received_at": now - int(rng.integers(30 * _DAY_US)),
        "caller": "benchmark",
        "role": "champion",
        "patient_hmac": f"{int(rng.integers(3000)):064x}",
        "image_hash": name.rjust(64, "0"),
        "model_version": version,
        "context": "none",
        "metadata": {"age_approx": 50.0},
        "risk": risk,
        "threshold": 0.05,
        "band": "low" if risk < 0.05 else "moderate",
        "abstained": False,
        "reasons": [],
        "stage_ms": {"total": float(rng.gamma(9, 2))},
    }


def measure(url: str, rounds: int) -> list[tuple[str, float, float, int]]:
    """(page, median ms, 95th percentile ms, bytes), pages in turn in each round; the first round is not counted."""
    times: dict[str, list[float]] = {page: [] for page in PAGES}
    sizes: dict[str, int] = {}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for _ in range(rounds + 1):
            for page in PAGES:
                started = time.perf_counter()
                answer = client.get(page)
                times[page].append((time.perf_counter() - started) * 1000)
                answer.raise_for_status()
                sizes[page] = len(answer.content)
    return [
        (page, float(np.median(found[1:])), float(np.quantile(found[1:], 0.95)), sizes[page])
        for page, found in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--store-url", required=True, help="the service's store, which is filled")
    parser.add_argument("--rows", default="0,100000", help="sizes of the log, smallest first")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    store = open_store(given.store_url, create=False)
    with httpx.Client(trust_env=False) as client:
        version = client.get(f"{given.url}/v1/model").json()["model_version"]
    print("| predictions | page | median ms | p95 ms | bytes |\n|---|---|---|---|---|")
    for number in map(int, given.rows.split(",")):
        fill(store, number, version)
        for page, median, p95, size in measure(given.url, given.rounds):
            print(f"| {number:,} | `{page}` | {median:.0f} | {p95:.0f} | {size:,} |", flush=True)


if __name__ == "__main__":
    main()
