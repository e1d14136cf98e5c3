"""The HTTP contract as models: what each route answers, with examples for the OpenAPI page.

The client reads answers with these models: this module and the other `*_api.py` import neither Ray nor OpenCV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modeling.abstention import REASONS
from serve.errors import ApiError

if TYPE_CHECKING:
    from monitoring.prediction_log import PredictionRecord

KEY_HEADER = "X-API-Key"
REPLAYED_AT = "Replayed-At"

View = Literal["overlay", "map", "side_by_side"]
"""What /v1/explain draws."""

PREDICTION_EXAMPLE = {
    "prediction_id": "6f1c1fd0d29f4c9ab9f04b8a0a7d7c6e",
    "risk": 0.0412,
    "image_score": 0.62,
    "class_probabilities": {"benign": 0.9588, "malignant": 0.0412},
    "band": "moderate",
    "threshold": 0.0105,
    "model_version": "3",
    "context": "none",
    "abstained": False,
    "reasons": [],
    "stage_ms": {"decode": 0.6, "score": 6.1, "fuse": 1.9, "log": 5.2, "total": 14.1},
}

_MODEL_CARD = {
    "model_version": "3",
    "digest": "9f2b" * 16,
    "task": "lesions",
    "synthetic": False,
    "classes": ["benign", "malignant"],
    "malignant": ["malignant"],
    "metadata_fields": {"age_approx": {"kind": "numeric", "minimum": 0, "maximum": 120}},
    "contexts": {"none": {"threshold": 0.0105, "metrics": {"auc": {"value": 0.91, "low": 0.88, "high": 0.93}}}},
    "engine": "onnxruntime",
    "engine_fallback": None,
    "abstention": None,
    "limits": {"max_image_bytes": 20971520, "max_pixels": 50000000, "max_batch_images": 1000},
    "shadow": None,
    "notice": "Not a medical device.",
}


class Prediction(BaseModel):
    """One lesion's answer; its record and image are on disk."""

    model_config = ConfigDict(json_schema_extra={"examples": [PREDICTION_EXAMPLE]})

    prediction_id: str = Field(description="id of the log row; labels refer to it")
    risk: float | None = Field(description="calibrated probability that the lesion is malignant; null when abstained")
    image_score: float | None = Field(description="the image network's uncalibrated malignancy score")
    class_probabilities: dict[str, float] | None = Field(description="calibrated probability per class")
    band: Literal["low", "moderate", "high"] | None
    threshold: float | None = Field(description="risk at and above which a lesion counts as positive")
    model_version: str
    context: Literal["image_only", "none", "patient"] = Field(
        description="what the risk rests on: image_only; none = with metadata, no patient context; patient"
    )
    abstained: bool = Field(description="the picture is not usable: no risk, and no score to guess it from")
    reasons: list[str] = Field(description=f"why it abstained, of {', '.join(REASONS)}; limits: /v1/model")
    stage_ms: dict[str, float] = Field(description="milliseconds per stage of the whole request")

    @classmethod
    def of(cls, record: PredictionRecord, stage_ms: dict[str, float]) -> Prediction:
        """The answer that a stored record stands for. The log keeps what an abstained picture would have scored, for
        review; a caller would take it for the risk."""
        fields = record.model_dump(include=set(cls.model_fields) - {"prediction_id", "stage_ms"})
        if record.abstained:
            fields |= {"image_score": None, "class_probabilities": None}
        return cls.model_construct(prediction_id=record.id, stage_ms=stage_ms, **fields)


class Problem(BaseModel):
    """Every answer that is not a success."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": "invalid_field",
                    "detail": "metadata field 'age_approx' is 400; expected a number from 0 to 120 or null",
                }
            ]
        }
    )

    error: str = Field(description="short code for programs")
    detail: str = Field(description="one line for people, naming the field")

    @classmethod
    def of(cls, error: ApiError) -> Problem:
        return cls(error=error.error, detail=error.detail)


class Health(BaseModel):
    """Liveness and readiness; `checks` has one entry per node."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"status": "ok", "checks": {"image_scorer": "ok", "metadata_fusion": "ok", "log": "ok"}}]
        }
    )

    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(default_factory=dict)


class ShadowState(BaseModel):
    """A challenger that scores a copy of the traffic. It answers nobody."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str
    digest: str
    fraction: float = Field(description="share of lesions that it is to score")
    scored: int = Field(description="lesions since this replica of the HTTP node got it, as the two below")
    dropped: int = Field(description="lesions that it did not get, because it was too slow or recovering")
    failed: int = Field(description="lesions that it gave no score")


class ModelCard(BaseModel):
    """The model that answers now."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), json_schema_extra={"examples": [_MODEL_CARD]})

    model_version: str
    digest: str = Field(description="sha256 of the bundle's manifest")
    task: str
    synthetic: bool
    classes: list[str]
    malignant: list[str]
    metadata_fields: dict[str, dict[str, Any]] = Field(description="fields that `metadata` may have")
    contexts: dict[str, dict[str, Any]] = Field(description="thresholds and metrics per context")
    engine: str
    engine_fallback: str | None = Field(
        default=None, description="why the engine that was chosen for this model does not run on this host"
    )
    abstention: dict[str, Any] | None = Field(
        default=None, description="limits beyond which pictures are not scored, and what they were measured to refuse"
    )
    limits: dict[str, int]
    shadow: ShadowState | None = Field(default=None, description="the challenger beside this model, if there is one")
    notice: str


ERASED: dict[int | str, dict[str, Any]] = {
    410: {"model": Problem, "description": "the patient was erased while this was under way; nothing of it is kept"}
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        400: "the request is not a well-formed form",
        408: "the body came too slowly (max_pause_s, min_bytes_per_s in the limits of /v1/model)",
        413: "the body, an image file or its number of pixels is over the limit",
        415: "the upload is not a JPEG, PNG or WebP file",
        422: "a field is missing, malformed or out of range, or the picture does not decode",
        503: "a node does not answer or the record is on no disk; send the same request again after Retry-After",
    }.items()
}
