"""Sends the lesions of a data set to a running service, one request each, as a clinic would on one day.

python -m local.traffic --url http://127.0.0.1:8000 --images day/train-image.hdf5 --metadata day/train-metadata.csv
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipelines.hdf5_index import open_hdf5
from data_pipelines.image_reader import as_bytes
from serve.api import Prediction
from serve.client import DermrayClient, DermrayError, RetryPolicy

ATTEMPTS = 5


@dataclass(frozen=True)
class Lesion:
    """One request: JPEG bytes, the metadata that the model knows, and where the picture comes from (`LesionOrigin`)."""

    image_id: str
    image: bytes
    metadata: dict[str, Any]
    origin: dict[str, str]


@dataclass
class Day:
    """What came back for a day's requests; `problems`: of each status but 200, what the first answer said."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    bands: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        return self.statuses[200]

    def summary(self) -> dict[str, Any]:
        """Counts, and the median time of a request in milliseconds."""
        return {
            "sent": self.sent,
            "answered": self.answered,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "bands": dict(self.bands),
            "requests_per_s": round(self.sent / self.seconds, 1) if self.seconds else None,
            "p50_ms": round(statistics.median(self.milliseconds), 1) if self.milliseconds else None,
        }


def read_lesions(
    images: Path, metadata: Path, fields: set[str], id_column: str = "isic_id", limit: int | None = None
) -> Iterator[Lesion]:
    """Lesions of an ISIC-format data set in the table's order.

    Args:
        fields: metadata columns to send; others, and missing values, are left out.
    """
    table = pd.read_csv(metadata, low_memory=False, nrows=limit)
    known = [column for column in table.columns if column in fields]
    with open_hdf5(images) as file:
        for row in table.to_dict("records"):
            values = {name: row[name] for name in known if not pd.isna(row[name])}
            origin = {"patient_id": row.get("patient_id"), "institution": row.get("attribution")}
            yield Lesion(
                image_id=row[id_column],
                image=as_bytes(file[row[id_column]][()]),
                metadata=values,
                origin={name: str(value) for name, value in origin.items() if isinstance(value, str)},
            )


def send_day(
    url: str,
    lesions: Iterator[Lesion] | list[Lesion],
    clients: int = 8,
    on_answer: Callable[[Lesion, Prediction], None] | None = None,
) -> Day:
    """Posts every lesion to `/v1/predict` from `clients` connections at a time; where the service says "later", the
    same request goes out again under the same key.

    Args:
        on_answer: told of each answer, from several threads.

    Raises:
        UnavailableError: the service cannot be reached.
    """
    day = Day()
    lock = threading.Lock()
    # trust_env off: the service is on loopback, whatever http_proxy says.
    with DermrayClient(url, retries=RetryPolicy(attempts=ATTEMPTS), trust_env=False) as client:

        def send(lesion: Lesion) -> None:
            started = time.perf_counter()
            status, band = 200, None
            try:
                answer = client.predict(lesion.image, lesion.metadata, **lesion.origin)
                band = answer.band or "abstained"
                if on_answer is not None:
                    on_answer(lesion, answer)
            except DermrayError as error:
                if error.status is None:
                    raise
                status = error.status
                with lock:
                    day.problems.setdefault(status, str(error))
            elapsed = (time.perf_counter() - started) * 1000
            with lock:
                day.sent += 1
                day.statuses[status] += 1
                day.milliseconds.append(elapsed)
                if band is not None:
                    day.bands[band] += 1

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for _ in pool.map(send, lesions):
                pass
        day.seconds = time.perf_counter() - started
    return day


def metadata_fields(url: str) -> set[str]:
    """The metadata fields that the service's model knows; asked once."""
    with DermrayClient(url, timeout_s=30.0, retries=RetryPolicy(attempts=1), trust_env=False) as client:
        return set(client.model().metadata_fields)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--metadata", type=Path, required=True)
    parser.add_argument("--id-column", default="isic_id")
    parser.add_argument("--limit", type=int, help="the first so many rows only")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    options = parser.parse_args(arguments)
    try:
        fields = metadata_fields(options.url)
        lesions = read_lesions(options.images, options.metadata, fields, options.id_column, options.limit)
        day = send_day(options.url, lesions, options.clients)
    except (DermrayError, ValueError, KeyError, OSError) as error:
        print(f"traffic: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for problem in day.problems.values():
        print(f"traffic: {problem}", file=sys.stderr)
    print(json.dumps(day.summary()))
    return 0 if day.answered == day.sent else 1


if __name__ == "__main__":
    raise SystemExit(main())
