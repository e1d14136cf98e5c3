"""What an idempotency key stands for: one whole request. Its repeat is answered, anything else is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from monitoring.prediction_log import PredictionRecord
from serve.errors import ApiError, invalid_field
from serve.lesion import LesionRequest


def logged_metadata(request: LesionRequest) -> dict[str, Any]:
    """A lesion's metadata as its record has it."""
    return {name: value for name, value in (request.metadata or {}).items() if value is not None}


def other_lesions() -> ApiError:
    """A patient's key came with lesions that its first request did not have."""
    return invalid_field("Idempotency-Key: this key was used with other lesions of a patient; send a new one")


def check_comparison(stored: Iterable[PredictionRecord], patient: bool) -> None:
    """Refuses to rank what was not compared: stored lesions of two requests that came under one key at one time, one
    with more lesions than the other. The records of one request have its time.

    Raises:
        ApiError: `other_lesions`.
    """
    if patient and len({record.received_at for record in stored}) > 1:
        raise other_lesions()


def conflict(
    request: LesionRequest, image_hash: str, patient_hmac: str | None, patient: bool, stored: PredictionRecord
) -> ApiError | None:
    """422 naming what differs, where the record stored under a request's key is of another request; None otherwise.

    Args:
        image_hash: of the request's picture.
        patient_hmac: of the request's patient.
        patient: whether the request compares a patient's lesions.
    """
    origin = request.origin
    same = {
        # Beside it the context depends on the model, which may have changed since.
        "route": (stored.context == "patient") == patient,
        "image": stored.image_hash == image_hash,
        "metadata": stored.metadata == logged_metadata(request),
        "patient_id": stored.patient_hmac == patient_hmac,
        "institution": stored.institution == origin.institution,
        "device": stored.device == origin.device,
        "acquired_at": stored.acquired_at == origin.acquired_at,
    }
    others = [name for name, is_same in same.items() if not is_same]
    if not others:
        return None
    return invalid_field(f"Idempotency-Key: this key was used with another {', '.join(others)}; send a new one")
