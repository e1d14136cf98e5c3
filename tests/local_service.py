"""The service's real routes with the other nodes in process, and what stands behind them."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.ingress import build_api
from serve.served_model import ServedModel
from serve.settings import DriftLoggerSettings, IngressSettings, ModelReference, UploadLimits
from tests.bundle_factory import LocalFusion, LocalScorer, LocalSidecar, backend, prediction_service, storage


class LocalService:
    """A client of a service that serves one bundle, its data below `home`.

    `nodes`: (scorer, fusion) that several services share; loading a bundle takes its time.
    """

    def __init__(
        self,
        reference: ModelReference,
        home: Path,
        limits: UploadLimits | None = None,
        nodes: tuple[LocalScorer, LocalFusion] | None = None,
        retry_after_s: int = 2,
        ingress: IngressSettings | None = None,
    ):
        places = storage(home)
        self.home = home
        self.log = open_log(places)
        self.sidecar = LocalSidecar(places)
        settings = DriftLoggerSettings(attempts=1, attempt_timeout_s=1, replay_interval_s=0.05)
        self.scorer, fusion = nodes or (LocalScorer(reference), LocalFusion(reference))
        durable = DurableLog(self.sidecar, self.log, settings)
        self.service = prediction_service((self.scorer, fusion), durable, limits, settings=ingress)
        self.service.use_model(ServedModel.load(reference))
        self.api = build_api(backend(self.service, self.log, retry_after_s=retry_after_s))
        self.client = TestClient(self.api, raise_server_exceptions=False)

    def rows(self) -> list[dict]:
        """All stored predictions."""
        return list(self.log.store.predictions_between(0, 2**62))

    def image_files(self) -> list[Path]:
        """All files below the image folder, temporary ones included."""
        return [path for path in (self.home / "images").rglob("*") if path.is_file()]
