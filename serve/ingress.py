"""The HTTP node: all routes on one screen, and the deployment that ties them to the other nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve.about_page import add_about_routes
from serve.alarm_routes import add_alarm_routes
from serve.analyse_page import add_analyse_routes
from serve.api import PROBLEMS, Health, ModelCard
from serve.api_docs import add_docs
from serve.backend import Backend
from serve.candidate_routes import add_candidate_routes
from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.explanation_routes import add_explanation_routes
from serve.front_door import open_front_door
from serve.gauges import watch_log
from serve.guards import build_door
from serve.http_errors import add_error_handlers
from serve.key_ring import KeyRing
from serve.label_routes import add_label_routes
from serve.label_studio_page import add_label_studio_routes
from serve.lesion_scoring import LesionScoring
from serve.metrics import ModelInfo, replica_metrics
from serve.model_decisions import ModelDecisions
from serve.model_slot import HoldsModel, ModelSlot
from serve.models_page import add_models_routes
from serve.monitoring_page import add_monitoring_routes
from serve.nodes import FusionNode, ScorerNode, SidecarNode
from serve.page_routes import add_page_routes
from serve.patient_routes import add_patient_routes
from serve.prediction_routes import add_prediction_routes
from serve.prediction_service import PredictionService
from serve.private_ports import listen_on_node_address
from serve.rate_limit import TokenBuckets
from serve.record_routes import add_record_routes
from serve.records import RecordService
from serve.request_ids import RequestIds, show_ids_in_log
from serve.retrain_routes import add_retrain_routes
from serve.review_page import add_review_routes
from serve.sampling import Sampler
from serve.served_model import ServedModel
from serve.sessions import Sessions
from serve.settings import ServeSettings
from serve.shadow_model import switch_shadow
from serve.shadow_settings import ServedModels, ShadowReference
from serve.sign_in_page import add_sign_in_routes
from serve.submission_queue import SubmissionQueue
from serve.submission_routes import add_submission_routes
from serve.submission_worker import SubmissionWorker
from serve.triage_routes import add_triage_routes
from serve.whole_form import WholeForm
from store.api_keys import list_api_keys


class _Api(FastAPI):
    """FastAPI with the guards around Starlette's own middleware, unless they stand ahead of Serve."""

    def __init__(self, backend: Backend, **options: Any):
        super().__init__(**options)
        self._answers_ids = backend.answers_ids
        self.door = build_door(backend, self.routes)

    def build_middleware_stack(self) -> ASGIApp:
        return RequestIds(self.door.inside(super().build_middleware_stack()), self._answers_ids)


def build_api(backend: Backend) -> _Api:
    """All routes, and what stands around them."""
    service, records, keys = backend.service, backend.records, backend.keys
    retry_after_s = service.settings.retry_after_s
    api = _Api(
        backend,
        title="dermray",
        summary="Risk of skin cancer from pictures of lesions. Not a medical device.",
        version="1",
        responses={503: PROBLEMS[503]},
        docs_url=None,
        redoc_url=None,
        # A path with a slash too many is 404 like any other, not a redirect past the access guard's table.
        redirect_slashes=False,
    )
    add_error_handlers(api)
    api.add_middleware(WholeForm)
    add_prediction_routes(api, service)
    add_triage_routes(api, service)
    add_explanation_routes(api, service)
    add_submission_routes(api, service, backend.submissions)
    add_record_routes(api, records)
    add_label_routes(api, service, records)
    add_alarm_routes(api, records)
    add_patient_routes(api, records)
    add_retrain_routes(api, backend.log, retry_after_s)
    decisions = ModelDecisions(backend.log, retry_after_s)
    add_candidate_routes(api, decisions)
    _add_model_routes(api, service, keys)
    add_docs(api, with_keys=keys is not None)
    add_sign_in_routes(api, backend)
    add_analyse_routes(api, backend)
    add_review_routes(api, backend)
    add_monitoring_routes(api, backend)
    add_label_studio_routes(api, backend)
    add_models_routes(api, backend, decisions)
    add_about_routes(api, backend)
    add_page_routes(api)
    return api


def _add_model_routes(api: FastAPI, service: PredictionService, keys: KeyRing | None) -> None:
    @api.get("/v1/model", operation_id="get_model")
    async def model() -> ModelCard:
        """The model that answers now: classes, metadata fields, thresholds, metrics, engine."""
        return ModelCard.model_validate(await service.model_card())

    @api.get("/healthz", operation_id="check_health")
    async def healthz() -> Health:
        """The HTTP node lives."""
        return Health(status="ok")

    @api.get("/readyz", operation_id="check_readiness", responses={503: {"model": Health}})
    async def readyz() -> Any:
        """Every node answers with the same model, and records find a disk."""
        checks = await service.readiness()
        if keys is not None:
            await keys.start()
            checks["api_keys"] = keys.state
        ready = all(state in ("ok", "spooling", "last known") for state in checks.values())
        health = Health(status="ok" if ready else "unavailable", checks=checks)
        return JSONResponse(health.model_dump(), 200 if ready else 503)


@serve.ingress()
class Ingress(HoldsModel):
    """Deployment: FastAPI around a `PredictionService` whose nodes are the handles of the other deployments."""

    def __init__(
        self,
        scorer: DeploymentHandle,
        fusion: DeploymentHandle,
        drift_logger: DeploymentHandle,
        settings: dict[str, Any],
    ):
        self._settings = config = ServeSettings.model_validate(settings)
        self._slot = ModelSlot(ServedModel.load)
        self._shadow: ShadowReference | None = None
        show_ids_in_log()
        listen_on_node_address()
        metrics = replica_metrics()
        self._model_info = ModelInfo(metrics, "Ingress")
        log = open_log(config.storage)
        self._log = DurableLog(SidecarNode(drift_logger), log, config.drift_logger)
        access = config.access
        keys = buckets = None
        if access.require_keys:
            keys = KeyRing(lambda: list_api_keys(log.store, live_only=True), access.refresh_s)
        if access.requests_per_s is not None:
            buckets = TokenBuckets(access.requests_per_s, access.burst)
        scoring = LesionScoring(
            ScorerNode(scorer, config.scorer, config.ingress.retry_after_s),
            FusionNode(fusion, config.ingress.retry_after_s),
            config.limits,
            config.ingress,
            config.scorer.max_batch_size,
        )
        patient_key = Path(config.storage.patient_key_file).read_bytes()
        service = PredictionService(scoring, self._log, patient_key, metrics)
        self._worker = SubmissionWorker(service, log, config.submissions)
        sampler = Sampler(metrics)
        watch_log(sampler, metrics, self._log, log)
        self._backend = Backend(
            service,
            log,
            RecordService(log, patient_key, config.ingress.retry_after_s),
            SubmissionQueue(service, log, config.submissions, self._worker.wake),
            Sessions(patient_key),
            keys,
            buckets,
            metrics,
            sampler,
            links=config.links,
            answers_ids=False,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = build_api(self._backend)
        open_front_door(api.door)
        return api

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serves what the bundles of `ServedModels` say; see `ModelSlot.use`."""
        self._backend.sampler.start()
        models = ServedModels.model_validate(config)
        model = await self._slot.use(models.champion.model_dump())
        self._backend.service.use_model(model)
        self._model_info.holds(model.reference.version, model.digest)
        self._shadow = models.shadow
        await switch_shadow(self._backend.service, models.shadow, self._settings, self._log)
        # What a replica before this one spooled and did not live to replay.
        self._log.start_replay()
        if self._backend.keys is not None:
            await self._backend.keys.start()
        self._worker.start()

    async def deployed(self) -> dict[str, Any]:
        """The settings and the models that this replica runs with: what a failed deploy puts back."""
        return {
            "settings": self._settings.model_dump(),
            "model": self._slot.state()["model"],
            "shadow": None if self._shadow is None else self._shadow.model_dump(),
        }

    async def __del__(self) -> None:
        # Serve calls it before it ends a replica, also one whose constructor failed.
        if hasattr(self, "_worker"):
            self._backend.service.use_shadow(None)
            await self._worker.stop()
            await self._backend.sampler.stop()
