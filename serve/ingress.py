"""The HTTP node: all routes on one screen, and the deployment that ties them to the other nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.api import PROBLEMS, Health, ModelCard
from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.explanation_routes import add_explanation_routes
from serve.http_errors import add_error_handlers
from serve.middleware import BodyLimit, NoticeHeader
from serve.nodes import FusionNode, ScorerNode, SidecarNode
from serve.prediction_routes import add_prediction_routes
from serve.prediction_service import PredictionService
from serve.served_model import ServedModel
from serve.settings import ModelReference, ServeSettings
from serve.whole_form import WholeForm

NOTICE_HEADER = "X-Dermray-Notice"
# Room for boundaries, field names and the text fields beside the image.
_FORM_BYTES = 2**20 + 2**16


def build_api(service: PredictionService) -> FastAPI:
    """The routes around a service; it must have a model before the first request."""
    limits = service.limits
    api = FastAPI(
        title="dermray",
        summary="Risk of skin cancer from pictures of lesions. Not a medical device.",
        version="1",
        responses={503: PROBLEMS[503]},
    )
    add_error_handlers(api)
    bodies = {"/v1/predict": limits.max_image_bytes, "/v1/predict/batch": limits.max_batch_bytes}
    bodies["/v1/explain"] = limits.max_image_bytes
    api.add_middleware(WholeForm)
    api.add_middleware(
        BodyLimit, limits={path: limit + _FORM_BYTES for path, limit in bodies.items()}, default=_FORM_BYTES
    )
    api.add_middleware(NoticeHeader, name=NOTICE_HEADER, value=lambda: service.model.notice)
    add_prediction_routes(api, service)
    add_explanation_routes(api, service)
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
        self._log = DurableLog(SidecarNode(drift_logger), open_log(config.storage), config.drift_logger)
        self.service = PredictionService(
            ScorerNode(scorer, config.ingress.retry_after_s),
            FusionNode(fusion, config.ingress.retry_after_s),
            self._log,
            config.limits,
            config.ingress,
            Path(config.storage.patient_key_file).read_bytes(),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.service)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the manifest of a `ModelReference`; the replica keeps its old model when that fails."""
        self.service.use_model(ServedModel.load(ModelReference.model_validate(config)))
        # What a replica before this one spooled and did not live to replay.
        self._log.start_replay()
