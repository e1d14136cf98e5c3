"""A tiny bundle to serve, pictures to send, and a graph without Ray: the three nodes called in process."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from local.one_process import LocalFusion as LocalFusion
from local.one_process import LocalScorer as LocalScorer
from local.one_process import LocalSidecar as OneProcessSidecar
from modeling.abstention import AbstentionRule
from modeling.preprocessing import decode_image, image_quality, resize
from monitoring.prediction_log import PredictionLog
from serve.backend import Backend
from serve.drift_logger import LogEntry
from serve.lesion_scoring import LesionScoring
from serve.prediction_service import PredictionService
from serve.records import RecordService
from serve.sessions import Sessions
from serve.settings import IngressSettings, ModelReference, StorageSettings, SubmissionSettings, UploadLimits
from serve.submission_queue import SubmissionQueue
from tests.tiny_bundle import SIZE, expected_outputs, tiny_bundle

CONTEXTS = ["image_only", "none"]


def served_bundle(
    directory: Path,
    version: str = "1",
    onnx_bias: float = 0.0,
    synthetic: bool = True,
    abstention: AbstentionRule | None = None,
) -> ModelReference:
    """A bundle with both single-lesion contexts; another `onnx_bias` gives another model. Without an abstention rule it
    scores everything."""
    bundle = tiny_bundle(
        directory,
        contexts=CONTEXTS,
        onnx_bias=onnx_bias,
        torch_bias=onnx_bias,
        synthetic=synthetic,
        abstention=abstention,
    )
    return ModelReference(bundle_uri=str(directory), sha256=bundle.digest, version=version)


def lesion_image(seed: int = 0, size: int = 48, suffix: str = ".jpg") -> bytes:
    """An encoded picture of a dark blob on skin; another seed gives other bytes."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), rng.integers(140, 220, 3), np.uint8)
    centre = tuple(int(value) for value in rng.integers(size // 3, 2 * size // 3, 2))
    cv2.circle(image, centre, size // 4, tuple(int(value) for value in rng.integers(20, 120, 3)), -1)
    noisy = np.clip(image.astype(int) + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)
    return cv2.imencode(suffix, noisy)[1].tobytes()


def blank_image(value: int = 0, size: int = 48) -> bytes:
    """An encoded picture of one grey value: no lesion."""
    return cv2.imencode(".png", np.full((size, size, 3), value, np.uint8))[1].tobytes()


def lesion_rule(number: int = 300) -> AbstentionRule:
    """Fitted on `lesion_image` of seeds 1000 and up, as the tiny network sees them."""
    images = [decode_image(lesion_image(seed)) for seed in range(1000, 1000 + number)]
    figures = [image_quality(image) for image in images]
    quality = {name: np.array([row[name] for row in figures]) for name in figures[0]}
    _, embeddings = expected_outputs(np.stack([resize(image, SIZE) for image in images]))
    rule = AbstentionRule.fit(quality, embeddings, np.arange(number), seed=0)
    assert rule is not None
    return rule


def storage(home: Path) -> StorageSettings:
    """Places below a test's home, with a patient key."""
    key = home / "patient.key"
    if not key.exists():
        key.write_bytes(b"a test's secret")
    return StorageSettings(
        store_url=f"sqlite:///{home}/store.db",
        images_url=str(home / "images"),
        spool_dir=str(home / "spool"),
        patient_key_file=str(key),
    )


class LocalSidecar(OneProcessSidecar):
    """`Sidecar` in process; while `down` is set, every call raises it."""

    def __init__(self, places: StorageSettings):
        super().__init__(places)
        self.down: Exception | None = None
        self.calls: list[list[LogEntry]] = []

    def _answer(self):
        if self.down is not None:
            raise self.down

    async def write(self, entries):
        self.calls.append(entries)
        self._answer()
        return await super().write(entries)

    async def find(self, caller, keys):
        self._answer()
        return await super().find(caller, keys)

    async def ping(self):
        self._answer()
        return await super().ping()


def prediction_service(
    nodes, durable, limits=None, key: bytes = b"a test's secret", settings: IngressSettings | None = None
) -> PredictionService:
    """A service over (scorer, fusion) in process; it has no model yet."""
    scoring = LesionScoring(*nodes, limits or UploadLimits(), settings or IngressSettings(), max_batch_size=4)
    return PredictionService(scoring, durable, key)


def backend(
    service: PredictionService, log: PredictionLog, key: bytes = b"a test's secret", retry_after_s: int = 2, **guards
) -> Backend:
    """What stands behind the routes of a service; no worker takes its submissions."""
    records = RecordService(log, key, retry_after_s)
    submissions = SubmissionQueue(service, log, SubmissionSettings(), wake=lambda: None)
    return Backend(service, log, records, submissions, Sessions(key), **guards)
