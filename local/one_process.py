"""The service's real routes in this process, without Ray: the nodes called in place, behind HTTP on loopback.

For what looks at pages and needs no cluster: pictures of them, and how long they take.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from monitoring.prediction_log import PredictionLog
from serve.backend import Backend
from serve.drift_logger import DriftLoggerLogic, LogEntry, open_log
from serve.durable_log import DurableLog
from serve.image_scorer import ImageScorerLogic
from serve.ingress import build_api
from serve.lesion_scoring import LesionScoring
from serve.metadata_fusion import MetadataFusionLogic
from serve.prediction_service import PredictionService
from serve.records import RecordService
from serve.served_model import ServedModel
from serve.sessions import Sessions
from serve.settings import (
    DriftLoggerSettings,
    IngressSettings,
    ModelReference,
    StorageSettings,
    SubmissionSettings,
    UploadLimits,
)
from serve.submission_queue import SubmissionQueue

_START_S = 60
_BATCH = 4
# Nobody's patients are behind this service.
_KEY = b"a service of one process"


class LocalScorer:
    """`Scorer` in process."""

    def __init__(self, reference: ModelReference):
        self.logic = ImageScorerLogic(reference, max_batch_size=_BATCH)

    async def score(self, images, deadline):
        return self.logic.score(images)

    def oldest_wait_s(self):
        return 0.0

    async def explain(self, image):
        return self.logic.activation_map(image)

    async def describe(self):
        return self.logic.describe()


class LocalFusion:
    """`Fusion` in process."""

    def __init__(self, reference: ModelReference):
        self.logic = MetadataFusionLogic(reference)

    async def fuse(self, log_probabilities, records):
        return self.logic.fuse(log_probabilities, records)

    async def fuse_patient(self, log_probabilities, records, trusted):
        return self.logic.fuse_patient(log_probabilities, records, trusted)

    async def describe(self):
        return self.logic.describe()


class LocalSidecar:
    """`Sidecar` in process."""

    def __init__(self, places: StorageSettings):
        self.logic = DriftLoggerLogic(open_log(places))

    async def write(self, entries: list[LogEntry]) -> Any:
        return self.logic.commit(entries)

    async def find(self, caller: str, keys: list[str]) -> Any:
        return self.logic.find(caller, keys)

    async def ping(self) -> Any:
        return self.logic.ping()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.listening.set()


def reference_of(bundle: Path, version: str) -> ModelReference:
    """What a service is told to serve this bundle.

    Raises:
        ValueError: the folder has no manifest.
    """
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"bundle {bundle}: there is no manifest.json; expected a folder that `train_model` wrote")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return ModelReference(bundle_uri=str(bundle), sha256=digest, version=version)


@contextmanager
def service_of(reference: ModelReference, home: Path) -> Iterator[tuple[str, PredictionLog]]:
    """Serves a bundle until the block ends, asking for no keys; yields the URL and the log, which is kept below `home`.

    What is submitted waits: no worker takes it.

    Raises:
        ValueError: the bundle cannot be served.
    """
    home.mkdir(parents=True, exist_ok=True)
    places = StorageSettings(
        store_url=f"sqlite:///{home}/store.db",
        images_url=str(home / "images"),
        spool_dir=str(home / "spool"),
        patient_key_file=str(home / "patient.key"),
    )
    log = open_log(places)
    scoring = LesionScoring(
        LocalScorer(reference), LocalFusion(reference), UploadLimits(), IngressSettings(), max_batch_size=_BATCH
    )
    service = PredictionService(scoring, DurableLog(LocalSidecar(places), log, DriftLoggerSettings()), _KEY)
    service.use_model(ServedModel.load(reference))
    records = RecordService(log, _KEY, retry_after_s=2)
    submissions = SubmissionQueue(service, log, SubmissionSettings(), wake=lambda: None)
    try:
        with on_loopback(build_api(Backend(service, log, records, submissions, Sessions(_KEY)))) as url:
            yield url, log
    finally:
        log.store.close()


@contextmanager
def on_loopback(api: Any, worker: Any = None) -> Iterator[str]:
    """Serves an ASGI application until the block ends; yields the URL.

    Args:
        worker: has `start()` and `await stop()`, called in the server's event loop; None: there is none.
    """
    server = _Server(uvicorn.Config(api, lifespan="off", log_level="warning"))

    async def serve(listener: socket.socket) -> None:
        if worker is not None:
            worker.start()
        try:
            await server.serve([listener])
        finally:
            if worker is not None:
                await worker.stop()

    # asyncio sends small answers at once only where the socket names its protocol: without, each page takes 40 ms more.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)), daemon=True)
        thread.start()
        try:
            if not server.listening.wait(_START_S):
                raise ValueError(f"the server did not start in {_START_S} s")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_START_S)
