"""The HTTP node: all routes on one screen, and the deployment that ties them to the other nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from monitoring.prediction_log import PredictionLog
from serve.api import PROBLEMS, Health, ModelCard
from serve.candidate_routes import add_candidate_routes
from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.http_errors import add_error_handlers
from serve.middleware import BodyLimit, NoticeHeader
from serve.nodes import FusionNode, ScorerNode, SidecarNode
from serve.prediction_routes import add_prediction_routes
from serve.prediction_service import PredictionService
from serve.retrain_routes import add_retrain_routes
from serve.served_model import ServedModel
from serve.settings import ModelReference, ServeSettings
from serve.submission_queue import SubmissionQueue
from serve.submission_routes import add_submission_routes
from serve.submission_worker import SubmissionWorker

NOTICE_HEADER = "X-Dermray-Notice"
# Room for boundaries, field names and the text fields beside the image.
_FORM_BYTES = 2**20 + 2**16


def build_api(service: PredictionService, log: PredictionLog, submissions: SubmissionQueue) -> FastAPI:
    """The routes around a service; it must have a model before the first request."""
    limits = service.limits
    api = FastAPI(
        title="dermray",
        summary="Risk of skin cancer from pictures of lesions. Not a medical device.",
        version="1",
        responses={503: PROBLEMS[503]},
    )
    add_error_handlers(api)
    bodies = {
        "/v1/predict": limits.max_image_bytes,
        "/v1/predict/batch": limits.max_batch_bytes,
        "/v1/submissions": limits.max_image_bytes,
    }
    api.add_middleware(
        BodyLimit, limits={path: limit + _FORM_BYTES for path, limit in bodies.items()}, default=_FORM_BYTES
    )
    api.add_middleware(NoticeHeader, name=NOTICE_HEADER, value=lambda: service.model.notice)
    add_prediction_routes(api, service)
    add_submission_routes(api, service, submissions)
    add_retrain_routes(api, log, service.settings.retry_after_s)
    add_candidate_routes(api, log, service.settings.retry_after_s)
    _add_model_routes(api, service)
    return api


def _add_model_routes(api: FastAPI, service: PredictionService) -> None:
    @api.get("/v1/model")
    async def model() -> ModelCard:
        """The model that answers now: classes, metadata fields, thresholds, metrics, engine."""
        return ModelCard.model_validate(await service.model_card())

    @api.get("/healthz")
    async def healthz() -> Health:
        """The HTTP node lives."""
        return Health(status="ok")

    @api.get("/readyz", responses={503: {"model": Health}})
    async def readyz() -> Any:
        """Every node answers with the same model, and records find a disk."""
        checks = await service.readiness()
        ready = all(state in ("ok", "spooling") for state in checks.values())
        health = Health(status="ok" if ready else "unavailable", checks=checks)
        return JSONResponse(health.model_dump(), 200 if ready else 503)


@serve.ingress()
class Ingress:
    """Deployment: FastAPI around a `PredictionService` whose nodes are the handles of the other deployments."""

    def __init__(
        self,
        scorer: DeploymentHandle,
        fusion: DeploymentHandle,
        drift_logger: DeploymentHandle,
        settings: dict[str, Any],
    ):
        config = ServeSettings.model_validate(settings)
        self._records = open_log(config.storage)
        self._log = DurableLog(SidecarNode(drift_logger), self._records, config.drift_logger)
        self.service = PredictionService(
            ScorerNode(scorer, config.ingress.retry_after_s),
            FusionNode(fusion, config.ingress.retry_after_s),
            self._log,
            config.limits,
            config.ingress,
            Path(config.storage.patient_key_file).read_bytes(),
        )
        self._worker = SubmissionWorker(self.service, self._records, config.submissions)
        self._submissions = SubmissionQueue(self.service, self._records, config.submissions, self._worker.wake)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.service, self._records, self._submissions)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the manifest of a `ModelReference`; the replica keeps its old model when that fails."""
        self.service.use_model(ServedModel.load(ModelReference.model_validate(config)))
        # What a replica before this one spooled and did not live to replay.
        self._log.start_replay()
        self._worker.start()

    async def __del__(self) -> None:
        # Serve calls it before it ends a replica, also one whose constructor failed.
        if hasattr(self, "_worker"):
            await self._worker.stop()
