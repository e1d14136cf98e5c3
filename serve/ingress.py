"""The HTTP node: routes, and the deployment that ties them to the other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Header, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serve.api import PROBLEMS, Health, ModelCard, Prediction, Problem
from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.errors import ApiError, invalid_field
from serve.lesion import (
    LesionRequest,
    Origin,
    parse_acquired_at,
    parse_json,
    parse_key,
    parse_metadata,
    parse_text,
)
from serve.middleware import BodyLimit, NoticeHeader
from serve.nodes import FusionNode, ScorerNode, SidecarNode
from serve.prediction_service import Outcome, PredictionService
from serve.served_model import ServedModel
from serve.settings import ModelReference, ServeSettings
from serve.upload import check_batch

NOTICE_HEADER = "X-Dermray-Notice"
# Room for boundaries, field names and the text fields beside the image.
_FORM_BYTES = 2**20 + 2**16
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_ORIGIN_FIELDS = ("patient_id", "institution", "device", "acquired_at")

PatientId = Annotated[str | None, Form(description="stored as a keyed hash only")]
Institution = Annotated[str | None, Form()]
Device = Annotated[str | None, Form(description="camera or dermatoscope")]
AcquiredAt = Annotated[str | None, Form(description="ISO 8601; UTC without an offset")]
IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", description="repeats of a request under one key get one answer")
]


def _problem(error: ApiError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(Problem.of(error).model_dump(), error.status, headers)


def _validation_problem(error: RequestValidationError) -> ApiError:
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"][1:]) or "body"
        parts.append(f"{field}: {item['msg'].removeprefix('Value error, ')}")
    return invalid_field("; ".join(parts))


def _http_problem(error: HTTPException) -> ApiError:
    return ApiError(error.status_code, _CODES.get(error.status_code, "http_error"), str(error.detail))


def _add_error_handlers(api: FastAPI) -> None:
    api.add_exception_handler(ApiError, lambda _, error: _problem(error))
    api.add_exception_handler(RequestValidationError, lambda _, error: _problem(_validation_problem(error)))
    api.add_exception_handler(HTTPException, lambda _, error: _problem(_http_problem(error)))
    # Its text may quote a patient's data; the log has it.
    internal = ApiError(500, "internal_error", "the service failed on this request; its log says why")
    api.add_exception_handler(Exception, lambda *_: _problem(internal))


async def _check_fields(request: Request, known: Sequence[str]) -> None:
    """Refuses fields that no one reads: a misspelt `metadata` would silently change what the model sees."""
    for name in await request.form():
        if name not in known:
            raise invalid_field(f"{name[:60]}: unknown form field; expected one of {', '.join(known)}")


def _origin(patient_id: str | None, institution: str | None, device: str | None, acquired_at: str | None) -> Origin:
    return Origin(
        patient_id=parse_text(patient_id, "patient_id"),
        institution=parse_text(institution, "institution"),
        device=parse_text(device, "device"),
        acquired_at=parse_acquired_at(acquired_at),
    )


def _answer(outcome: Outcome) -> Prediction | Problem:
    return Problem.of(outcome) if isinstance(outcome, ApiError) else Prediction.of(*outcome)


def build_api(service: PredictionService) -> FastAPI:
    """The routes around a service; it must have a model before the first request."""
    limits = service.limits
    api = FastAPI(
        title="dermray",
        summary="Risk of skin cancer from pictures of lesions. Not a medical device.",
        version="1",
        responses={503: PROBLEMS[503]},
    )
    _add_error_handlers(api)
    bodies = {"/v1/predict": limits.max_image_bytes, "/v1/predict/batch": limits.max_batch_bytes}
    api.add_middleware(
        BodyLimit, limits={path: limit + _FORM_BYTES for path, limit in bodies.items()}, default=_FORM_BYTES
    )
    api.add_middleware(NoticeHeader, name=NOTICE_HEADER, value=lambda: service.model.notice)

    @api.post("/v1/predict", responses=PROBLEMS)
    async def predict(
        request: Request,
        image: Annotated[UploadFile, File(description="JPEG, PNG or WebP")],
        metadata: Annotated[str | None, Form(description="JSON object; see metadata_fields of /v1/model")] = None,
        patient_id: PatientId = None,
        institution: Institution = None,
        device: Device = None,
        acquired_at: AcquiredAt = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Prediction:
        """Scores one lesion. 200 means that the record and the image are on disk."""
        await _check_fields(request, ("image", "metadata", *_ORIGIN_FIELDS))
        lesion = LesionRequest(
            image=await image.read(),
            metadata=parse_metadata(None if metadata is None else parse_json(metadata, "metadata"), service.model.task),
            origin=_origin(patient_id, institution, device, acquired_at),
            idempotency_key=parse_key(idempotency_key),
        )
        (outcome,) = await service.predict([lesion])
        if isinstance(outcome, ApiError):
            raise outcome
        return Prediction.of(*outcome)

    @api.post("/v1/predict/batch", responses=PROBLEMS)
    async def predict_batch(
        request: Request,
        images: Annotated[list[UploadFile], File(description="JPEG, PNG or WebP, each under this name")],
        metadata: Annotated[str | None, Form(description="JSON list: one object or null per image")] = None,
        patient_id: PatientId = None,
        institution: Institution = None,
        device: Device = None,
        acquired_at: AcquiredAt = None,
        idempotency_key: IdempotencyKey = None,
    ) -> list[Prediction | Problem]:
        """Scores many lesions: a list in their order, with {error, detail} in place of each that is wrong itself.

        The other fields hold for all of them.
        """
        await _check_fields(request, ("images", "metadata", *_ORIGIN_FIELDS))
        files = [await image.read() for image in images]
        check_batch(files, limits)
        records = [None] * len(images) if metadata is None else parse_json(metadata, "metadata")
        if not isinstance(records, list) or len(records) != len(images):
            raise invalid_field(f"metadata: expected a JSON list of {len(images)} entries, one per image")
        origin = _origin(patient_id, institution, device, acquired_at)
        key = parse_key(idempotency_key)
        lesions: list[LesionRequest | ApiError] = []
        for index, (file, record) in enumerate(zip(files, records, strict=True)):
            item_key = None if key is None else f"{key}/{index}"
            try:
                cleaned = parse_metadata(record, service.model.task)
                lesions.append(LesionRequest(file, cleaned, origin, item_key))
            except ApiError as error:
                lesions.append(error)
        return list(map(_answer, await service.predict(lesions)))

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

    return api


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
