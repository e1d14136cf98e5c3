"""How long the service takes for each page, and how many bytes it sends, beside a log that grows.

    python -m benchmarks.page_rendering --bundle DIR [--rows 10000,100000] [--rounds 20]

The real routes in one process over a SQLite file of its own, pages asked for by HTTP on loopback, one after the other.
The log holds 30 days of predictions with the rows of their pictures (no files), a fifth of them read, drift reports,
and an alarm for each hundred; then the same with every lesion read. `/results` shows three samples, which are scored
before the clock runs; nothing is scored while it does. Scripts, style sheets and pictures are requests of their own
and are not counted.

CPU is that of the whole process, client included: where the machine is shared, it says more than the clock. Prints a
Markdown table last.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import sqlalchemy as sql

from local.one_process import reference_of, service_of
from store.database import Store
from store.tables import alarms, drift_reports, images, labels, now_us, predictions

PAGES = ("/", "/review", "/review/label-studio", "/monitoring", "/monitoring?hours=168", "/models", "/about")
DAYS, READERS, READ, ABSTAINED = 30, 7, 0.2, 0.03
VERSION, CALLER = "1", "benchmark"
_DAY_US = 86_400_000_000
_BATCH = 5_000
# A page says so where the store took too long for a part of it: what is then measured is another page.
_LACKING = "The store does not answer"


@dataclass(frozen=True)
class Timing:
    """Of one page; milliseconds, and bytes of its HTML."""

    page: str
    median_ms: float
    p95_ms: float
    cpu_ms: float
    num_bytes: int


def fill(store: Store, number: int, seed: int = 0) -> None:
    """Writes so many predictions of the last 30 days, their pictures' rows, labels, alarms and drift reports."""
    rng, now = np.random.default_rng(seed), now_us()
    for start in range(0, number, _BATCH):
        rows = [
            _prediction(rng, now - at * DAYS * _DAY_US // number, at, number)
            for at in range(start, min(start + _BATCH, number))
        ]
        pictures = [
            {"hash": row["image_hash"], "suffix": ".jpg", "num_bytes": 20_000, "stored_at": row["received_at"]}
            for row in rows
        ]
        with store.writing() as connection:
            connection.execute(predictions.insert(), rows)
            connection.execute(images.insert(), pictures)
            connection.execute(labels.insert(), [_label(row) for row in rows if rng.random() < READ])
            connection.execute(alarms.insert(), [_alarm(row) for row in rows[::100]])
        print(f"{start + len(rows):,} of {number:,} predictions written", file=sys.stderr, flush=True)
    with store.writing() as connection:
        connection.execute(drift_reports.insert(), [_report(now, day, number // DAYS) for day in range(1, DAYS)])


def read_the_rest(store: Store) -> None:
    """Gives a label to every prediction that has none."""
    with store.reading() as connection:
        said = set(connection.execute(sql.select(labels.c.prediction_id)).scalars())
        query = sql.select(predictions.c.id, predictions.c.received_at).where(predictions.c.caller == CALLER)
        rows = connection.execute(query).mappings()
        unread = [_label(dict(row)) for row in rows if row["id"] not in said]
    with store.writing() as connection:
        connection.execute(labels.insert(), unread)


def _prediction(rng: np.random.Generator, received_at: int, at: int, number: int) -> dict[str, Any]:
    abstained = bool(rng.random() < ABSTAINED)
    risk = float(rng.beta(0.3, 6))
    row = {"id": f"benchmark-{at}", "received_at": received_at, "caller": CALLER, "role": "champion"}
    row |= {"patient_hmac": f"{at % max(1, number // 10):064x}", "image_hash": f"{at:064x}", "model_version": VERSION}
    row |= {"institution": f"institution {at % 12}", "device": f"device {at % 6}", "context": "none"}
    # As wide as a row of 40 columns is.
    row |= {"metadata": {f"column_{name}": float(value) for name, value in enumerate(rng.random(40).round(4))}}
    row |= {"risk": None if abstained else risk, "threshold": None if abstained else 0.05, "abstained": abstained}
    row |= {"band": None if abstained else "low" if risk < 0.05 else "moderate"}
    row |= {"reasons": ["blurred"] if abstained else [], "embedding": rng.bytes(128)}
    return row | {"stage_ms": {"total": float(rng.gamma(9, 2))}}


def _label(row: dict[str, Any]) -> dict[str, Any]:
    reader = f"reader {int(row['id'].rpartition('-')[2]) % READERS}"
    said = {"prediction_id": row["id"], "label": "benign", "malignant": False, "labeller": reader}
    return said | {"labelled_at": row["received_at"], "source": "api"}


def _alarm(row: dict[str, Any]) -> dict[str, Any]:
    alarm = {"dedupe_key": f"drift:{row['id']}", "kind": "drift", "severity": "warning", "model_version": VERSION}
    return alarm | {"raised_at": row["received_at"], "message": "drift of a benchmark", "detail": {}}


def _report(now: int, days_ago: int, rows: int) -> dict[str, Any]:
    start = (now // _DAY_US - days_ago) * _DAY_US
    row = {"window_start": start, "window_end": start + _DAY_US, "model_version": VERSION, "reference": "r" * 64}
    row |= {"label_watermark": 0, "status": "ok", "num_rows": rows, "num_groups": rows // 10, "alarm": False}
    features = [
        {
            **{"name": f"column_{name}", "statistic": "ks_distance", "distance": 0.05, "threshold": 0.2},
            **{"drifted": False, "n_reference": 3000, "n_current": rows},
        }
        for name in range(40)
    ]
    row |= {"drifted": [], "statistics": {"features": features}, "input_digest": "d" * 64, "created_at": now}
    return row


def analyse_samples(client: httpx.Client, number: int = 3) -> str:
    """Sends sample pictures by the form; returns the address of their answers."""
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', client.get("/").text))
    folder = Path(__file__).resolve().parents[1] / "serve" / "web" / "samples"
    files = [("images", (path.name, path.read_bytes(), "image/jpeg")) for path in sorted(folder.glob("*.jpg"))[:number]]
    client.post("/", data=fields, files=files).raise_for_status()
    return f"/results/{fields['key']}?n={number}"


def measure(client: httpx.Client, pages: Sequence[str], rounds: int) -> list[Timing]:
    """Pages in turn in each round; the first round is not counted."""
    clock: dict[str, list[float]] = {page: [] for page in pages}
    cpu: dict[str, list[float]] = {page: [] for page in pages}
    sizes: dict[str, int] = {}
    for _ in range(rounds + 1):
        for page in pages:
            started, used = time.perf_counter(), time.process_time()
            answer = client.get(page)
            clock[page].append((time.perf_counter() - started) * 1000)
            cpu[page].append((time.process_time() - used) * 1000)
            answer.raise_for_status()
            if _LACKING in answer.text:
                raise SystemExit(f"{page}: a part was left out, for the store took too long; is the machine busy?")
            sizes[page] = len(answer.content)
    return [
        Timing(
            page.partition("/page-")[0] + ("/…" if "/page-" in page else ""),
            float(np.median(clock[page][1:])),
            float(np.quantile(clock[page][1:], 0.95)),
            float(np.median(cpu[page][1:])),
            sizes[page],
        )
        for page in pages
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="a model that takes pictures")
    parser.add_argument("--rows", default="10000,100000", help="sizes of the log")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    lines = []
    for number in map(int, given.rows.split(",")):
        with (
            tempfile.TemporaryDirectory() as home,
            service_of(reference_of(given.bundle.resolve(), VERSION), Path(home)) as (url, log),
            httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
        ):
            fill(log.store, number)
            pages = (*PAGES[:1], analyse_samples(client), *PAGES[1:])
            found = [(timing, "a fifth") for timing in measure(client, pages, given.rounds)]
            read_the_rest(log.store)
            found += [(timing, "all") for timing in measure(client, ("/review", "/monitoring"), given.rounds)]
        lines += [
            f"| {number:,} | {read} | `{timing.page}` | {timing.median_ms:.0f} | {timing.p95_ms:.0f} | "
            f"{timing.cpu_ms:.0f} | {timing.num_bytes:,} |"
            for timing, read in found
        ]
    print("| predictions | read | page | median ms | p95 ms | CPU ms | bytes |\n|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
