"""The routes that score pictures: one lesion, or a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import FastAPI, File, Form, Header, Request, UploadFile

from serve.access import caller_of
from serve.api import ERASED, PROBLEMS, Prediction, Problem
from serve.arrival import received_at
from serve.errors import ApiError, invalid_field
from serve.http_errors import check_form_fields
from serve.lesion import (
    LesionRequest,
    Origin,
    parse_acquired_at,
    parse_json,
    parse_key,
    parse_metadata,
    parse_text,
)
from serve.prediction_service import Outcome, PredictionService
from serve.upload import check_batch

ORIGIN_FIELDS = ("patient_id", "institution", "device", "acquired_at")

PatientId = Annotated[str | None, Form(description="stored as a keyed hash only")]
Institution = Annotated[str | None, Form()]
Device = Annotated[str | None, Form(description="camera or dermatoscope")]
AcquiredAt = Annotated[str | None, Form(description="ISO 8601; UTC without an offset")]
IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", description="repeats of a request under one key get one answer")
]


def parse_origin(
    patient_id: str | None, institution: str | None, device: str | None, acquired_at: str | None
) -> Origin:
    """The form's fields of origin; ApiError 422 naming the one that is wrong."""
    return Origin(
        patient_id=parse_text(patient_id, "patient_id"),
        institution=parse_text(institution, "institution"),
        device=parse_text(device, "device"),
        acquired_at=parse_acquired_at(acquired_at),
    )


def parse_lesions(
    files: Sequence[bytes],
    metadata: str | None,
    origin: Origin,
    key: str | None,
    caller: str,
    received_at: int,
    service: PredictionService,
) -> list[LesionRequest | ApiError]:
    """The lesions of a request with many pictures, in order; one with wrong metadata is an error by itself.

    Raises:
        ApiError: 413 too many pictures or pixels together, 422 `metadata` is no list of as many entries.
    """
    check_batch(files, service.limits)
    records = [None] * len(files) if metadata is None else parse_json(metadata, "metadata")
    if not isinstance(records, list) or len(records) != len(files):
        raise invalid_field(f"metadata: expected a JSON list of {len(files)} entries, one per image")
    lesions: list[LesionRequest | ApiError] = []
    for index, (file, record) in enumerate(zip(files, records, strict=True)):
        item_key = None if key is None else f"{key}/{index}"
        try:
            cleaned = parse_metadata(record, service.model.task)
            lesions.append(LesionRequest(file, cleaned, origin, item_key, caller, received_at=received_at))
        except ApiError as error:
            lesions.append(error)
    return lesions


def _answer(outcome: Outcome) -> Prediction | Problem:
    return Problem.of(outcome) if isinstance(outcome, ApiError) else Prediction.of(*outcome)


def add_prediction_routes(api: FastAPI, service: PredictionService) -> None:
    """`POST /v1/predict` and `POST /v1/predict/batch`."""

    @api.post("/v1/predict", operation_id="predict", responses=PROBLEMS | ERASED)
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
        await check_form_fields(request, ("image", "metadata", *ORIGIN_FIELDS))
        lesion = LesionRequest(
            image=await image.read(),
            metadata=parse_metadata(None if metadata is None else parse_json(metadata, "metadata"), service.model.task),
            origin=parse_origin(patient_id, institution, device, acquired_at),
            idempotency_key=parse_key(idempotency_key),
            caller=caller_of(request).name,
            received_at=received_at(request),
        )
        (outcome,) = await service.predict([lesion], "/v1/predict")
        if isinstance(outcome, ApiError):
            raise outcome
        return Prediction.of(*outcome)

    @api.post("/v1/predict/batch", operation_id="predict_batch", responses=PROBLEMS | ERASED)
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
        await check_form_fields(request, ("images", "metadata", *ORIGIN_FIELDS), lists=("images",))
        files = [await image.read() for image in images]
        origin = parse_origin(patient_id, institution, device, acquired_at)
        key, caller = parse_key(idempotency_key), caller_of(request).name
        lesions = parse_lesions(files, metadata, origin, key, caller, received_at(request), service)
        return list(map(_answer, await service.predict(lesions, "/v1/predict/batch")))
