"""A month of a small clinic, replayed: synthetic patients day by day, three days of which are not like the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import onnxruntime

from data_pipelines.synthetic_dataset import Shift, write_sample
from local import replay
from local.cluster import LocalCluster
from local.jobs import run_job_on
from modeling.bundle import Bundle
from modeling.preprocessing import decode_image, resize
from monitoring.prediction_log import EMBEDDING_NAMES

PATIENTS_A_DAY, LESIONS, PREVALENCE = 40, 8.0, 0.12
CAMERA = Shift(red=0.86, green=0.98, blue=1.18, blur=1.6)
OLDER = Shift(age_years=18.0)
# First day and number of days, from 0; the days between are the ones that are not like the others.
ORDINARY = ((0, 9), (10, 7), (18, 6), (25, 5))
CAMERA_DAY, AGE_DAY, EMBEDDING_DAY = 9, 17, 24
DAYS = 30
# Embeddings move by so much, in standard deviations of the reference, averaged (root mean square) over dimensions.
SIGMA = 0.15


@dataclass
class Month:
    """The clinic's service, its jobs and its calendar.

    Attributes:
        home: DERMRAY_HOME of the jobs.
        first: the first day.
        keys: API key by the name of who holds it.
    """

    home: Path
    cluster: LocalCluster
    first: date
    url: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    jobs: int = 0

    def job(self, verb: str, *flags: str) -> dict[str, Any]:
        """Submits a job to the cluster and returns its result."""
        self.jobs += 1
        name = f"month-{self.jobs}-{verb}"
        return run_job_on(self.cluster.client_environment(), self.home, verb, list(flags), name, show=lambda _: None)

    def day(self, number: int) -> date:
        return self.first + timedelta(days=number)

    def part(self, name: str) -> Path:
        return self.home / "clinic" / name

    def write(self, name: str, days: int, seed: int, shift: Shift | None = None) -> None:
        """The patients of some days, as a data set."""
        write_sample(
            self.part(name), PATIENTS_A_DAY * days, LESIONS, PREVALENCE, seed, shift or Shift(), lambda _: None
        )

    def send(self, name: str, first_day: int, days: int) -> dict[str, Any]:
        """Replays a data set as the requests of these days."""
        flags = ["--start", self.day(first_day).isoformat(), "--days", str(days)]
        return self._replay("send", name, "--images", str(self.part(name) / "train-image.hdf5"), *flags)

    def label(self, name: str, until: datetime, delay_days: float) -> dict[str, Any]:
        """Sends what experts had said of a data set by `until`."""
        return self._replay("label", name, "--until", until.isoformat(), "--delay-days", str(delay_days))

    def _replay(self, verb: str, name: str, *flags: str) -> dict[str, Any]:
        folder = self.part(name)
        files = ["--metadata", str(folder / "train-metadata.csv"), "--answers", str(folder / "answers.csv")]
        result: list[str] = []
        status = replay.main(["--url", self.url, verb, *files, *flags], result.append)
        assert status == 0, f"replay {verb} of {name}: {result}"
        return json.loads(result[-1])

    def evening(self, number: int) -> datetime:
        """The end of a day."""
        last = self.day(number + 1)
        return datetime(last.year, last.month, last.day, tzinfo=UTC)


def embeddings(bundle: Bundle, pictures: list[np.ndarray]) -> np.ndarray:
    """What the log would hold of pictures: float32 (N, 64)."""
    session = onnxruntime.InferenceSession(str(bundle.onnx_path), providers=["CPUExecutionProvider"])
    matrix, mean = bundle.projection()
    batch = np.stack([resize(picture, bundle.manifest.input_size) for picture in pictures])
    (embedding,) = session.run(["embedding"], {session.get_inputs()[0].name: batch})
    return (embedding - mean) @ matrix


def warmer(picture: np.ndarray, strength: float) -> np.ndarray:
    """A slightly other white balance of uint8 RGB (H, W, 3)."""
    gains = np.array([1 + strength, 1.0, 1 - strength], np.float32)
    return np.clip(picture.astype(np.float32) * gains, 0, 255).round().astype(np.uint8)


def shift_embeddings(folder: Path, bundle: Bundle, sigma: float) -> float:
    """Gives a data set's pictures another white balance, by as much as moves their embeddings by `sigma`; returns how
    far they moved. (Set on the first 100 of 328 pictures, all of them moved by 0.117 instead of 0.15.)"""
    with h5py.File(folder / "train-image.hdf5", "r") as file:
        pictures = {name: decode_image(bytes(file[name][()])) for name in file}
    scale = bundle.reference()[list(EMBEDDING_NAMES)].to_numpy().std(axis=0)
    before = embeddings(bundle, list(pictures.values()))

    def moved(change: Callable[[np.ndarray], np.ndarray]) -> float:
        steps = (embeddings(bundle, [change(picture) for picture in pictures.values()]) - before).mean(axis=0) / scale
        return float(np.sqrt(np.mean(steps**2)))

    low, high = 0.0, 0.3
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(lambda picture, by=middle: warmer(picture, by)) < sigma else (low, middle)
    with h5py.File(folder / "train-image.hdf5", "w") as file:
        for name, picture in pictures.items():
            # Without loss, so that nothing but the colours changes.
            encoded = cv2.imencode(".png", cv2.cvtColor(warmer(picture, low), cv2.COLOR_RGB2BGR))[1]
            file.create_dataset(name, data=np.void(encoded.tobytes()))
    return moved(lambda picture: warmer(picture, low))
