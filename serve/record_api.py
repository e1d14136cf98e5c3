"""Requests and answers of the routes around the log, as models with examples."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modeling.image_limits import QUALITY_NAMES
from serve.api import PROBLEMS, Problem
from serve.times import utc

BAD_JSON = {"model": Problem, "description": "the body is not JSON"}
NOT_FOUND = {"model": Problem, "description": "nothing is stored under this id, or no longer"}
UNAVAILABLE = {"model": Problem, "description": "the store does not answer; send the same request after Retry-After"}
READ_PROBLEMS: dict[int | str, dict[str, Any]] = {422: PROBLEMS[422], 503: UNAVAILABLE}
ITEM_PROBLEMS: dict[int | str, dict[str, Any]] = {404: NOT_FOUND, **READ_PROBLEMS}
BODY_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: BAD_JSON,
    408: PROBLEMS[408],
    413: PROBLEMS[413],
    **ITEM_PROBLEMS,
}

Cursor = Annotated[str | None, Field(description="next_cursor of the page before; none: the newest")]
Limit = Annotated[int, Field(ge=1, le=200, description="items per page")]

_LABEL = {
    "id": 12,
    "prediction_id": "6f1c1fd0d29f4c9ab9f04b8a0a7d7c6e",
    "label": "malignant",
    "malignant": True,
    "labeller": "Dr Weber",
    "labelled_at": "2024-05-03T10:12:00Z",
    "confidence": 0.9,
    "comment": "confirmed by histology",
    "supersedes": None,
    "source": "api",
    "adjudication": False,
}
_TRUTH = {
    "label": "malignant",
    "malignant": True,
    "state": "single",
    "readers": 1,
    "first_labelled_at": "2024-05-03T10:12:00Z",
    "labelled_at": "2024-05-03T10:12:00Z",
}
_USE = {
    "dataset_digest": "4d967a30111bf29f0eba01c448b375c1629b2fed01cdfcc3aed91f1b57d5dd5e",
    "state": "ready",
    "model_versions": ["4"],
}
_RECORD = {
    "prediction_id": "6f1c1fd0d29f4c9ab9f04b8a0a7d7c6e",
    "received_at": "2024-05-01T09:30:00.123456Z",
    "acquired_at": "2024-05-01T09:28:11Z",
    "caller": "clinic",
    "role": "champion",
    "patient_hmac": "5d5d139563c95b5967b9bd9a8c9b233a9dedb45072794cd232dc1b74832607d0",
    "institution": "clinic",
    "device": "dermatoscope",
    "image_hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "model_version": "3",
    "context": "none",
    "metadata": {"age_approx": 60.0},
    "image_score": 0.62,
    "class_probabilities": {"benign": 0.9588, "malignant": 0.0412},
    "risk": 0.0412,
    "band": "moderate",
    "threshold": 0.0105,
    "abstained": False,
    "reasons": [],
    "quality": {"brightness": 0.61, "contrast": 0.12, "blur": 2.1, "red": 0.7, "green": 0.5, "blue": 0.4},
    "stage_ms": {"decode": 0.6, "score": 6.1, "fuse": 1.9, "total": 8.9},
    "labelled": True,
}
_ALARM = {
    "id": 4,
    "kind": "missed_cancer",
    "severity": "critical",
    "raised_at": "2024-05-03T10:12:00Z",
    "model_version": "3",
    "message": "missed cancer: prediction 6f1c... of model 3 has risk 0.002, below its threshold 0.0105, and is "
    "labelled malignant",
    "detail": {"prediction_id": "6f1c1fd0d29f4c9ab9f04b8a0a7d7c6e", "risk": 0.002, "threshold": 0.0105},
    "acknowledged_at": None,
    "acknowledged_by": None,
    "topic": "missed_cancer:6f1c1fd0d29f4c9ab9f04b8a0a7d7c6e",
    "quieted_by": None,
    "deliveries": {"oncall": "sent"},
}
_SUMMARY = {
    "start": "2024-05-03T09:30:00Z",
    "end": "2024-05-03T10:30:00Z",
    "predictions": 412,
    "abstained": 9,
    "by_band": {"low": 390, "moderate": 11, "high": 2},
    "by_model_version": {"3": 412},
    "abstention_reasons": {"blurred": 9},
    "per_hour": [{"start": "2024-05-03T09:30:00Z", "predictions": 412, "abstained": 9}],
    "total_ms": {"mean": 15.2, "median": 14.1, "p95": 24.8, "p99": 38.5},
    "drift": [],
    "unacknowledged_alarms": {"missed_cancer": 1},
    "labels": 3,
    "missed_cancers": 1,
    "shadow": [
        {
            "champion_version": "3",
            "shadow_version": "4",
            "pairs": 398,
            "champion_abstained": 0,
            "shadow_abstained": 5,
            "mean_abs_difference": 0.0031,
            "rank_correlation": 0.94,
            "ranked_pairs": 398,
            "same_band": 0.985,
            "raised": 0.01,
            "lowered": 0.0025,
        }
    ],
}


def _example(value: dict[str, Any], **config: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [value]}, protected_namespaces=(), **config)


class LoggedPrediction(BaseModel):
    """One record of the log, without its embedding."""

    model_config = _example(_RECORD)

    prediction_id: str
    received_at: datetime
    acquired_at: datetime | None
    caller: str
    role: Literal["champion", "shadow"]
    patient_hmac: str | None = Field(description="pseudonym: equal for the records of one patient")
    institution: str | None
    device: str | None
    image_hash: str | None
    model_version: str
    context: Literal["image_only", "none", "patient"]
    metadata: dict[str, Any]
    image_score: float | None
    class_probabilities: dict[str, float] | None = Field(
        description="of an abstained picture: what it would have been given; for review only"
    )
    risk: float | None
    band: Literal["low", "moderate", "high"] | None
    threshold: float | None
    abstained: bool
    reasons: list[str]
    quality: dict[str, float | None] = Field(description=f"of the whole picture: {', '.join(QUALITY_NAMES)}")
    stage_ms: dict[str, float]
    labelled: bool

    @classmethod
    def fields_of(cls, row: Mapping[str, Any], labelled: bool) -> dict[str, Any]:
        """A row of the store under the answer's names."""
        return {
            **{name: row[name] for name in LoggedPrediction.model_fields if name in row},
            "prediction_id": row["id"],
            "received_at": utc(row["received_at"]),
            "acquired_at": utc(row["acquired_at"]),
            "quality": {name: row[name] for name in QUALITY_NAMES},
            "labelled": labelled,
        }


class Label(BaseModel):
    """One stored label; a labeller's later label supersedes the one before it."""

    model_config = _example(_LABEL)

    id: int
    prediction_id: str
    label: str
    malignant: bool
    labeller: str
    labelled_at: datetime
    confidence: float | None
    comment: str | None
    supersedes: int | None = Field(description="id of the same labeller's label that this one corrects")
    source: str = Field(description="api, or the kind of file that it was imported from")
    adjudication: bool = Field(description="settles what readers see differently")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Label:
        return cls(**{**row, "labelled_at": utc(row["labelled_at"])})


class Truth(BaseModel):
    """What a prediction's labels come to."""

    model_config = _example(_TRUTH)

    label: str | None = Field(description="null: the readers disagree")
    malignant: bool | None = Field(description="null: the readers disagree on this too")
    state: Literal["single", "agreed", "disagreed", "adjudicated"]
    readers: int = Field(description="labellers whose label counts, without those who adjudicate")
    first_labelled_at: datetime
    labelled_at: datetime = Field(description="of the latest label that counts")

    @classmethod
    def of(cls, truth: Any) -> Truth:
        """Of a `store.label_consensus.Truth`, whose module clients do not import."""
        times = {name: utc(getattr(truth, name)) for name in ("first_labelled_at", "labelled_at")}
        return cls(**{**{name: getattr(truth, name) for name in cls.model_fields}, **times})


class DatasetUse(BaseModel):
    """A data set version that a prediction was added to, and the models trained on it."""

    model_config = _example(_USE)

    dataset_digest: str
    state: Literal["building", "ready", "deleted"]
    model_versions: list[str]


class LabelledPrediction(LoggedPrediction):
    """One record with its labels, oldest first."""

    model_config = _example({**_RECORD, "labels": [_LABEL], "truth": _TRUTH, "used_in": [_USE]})

    labels: list[Label]
    truth: Truth | None = Field(description="what the labels come to; null without any")
    used_in: list[DatasetUse] = Field(description="data set versions that hold this lesion, oldest first")


class PredictionPage(BaseModel):
    """Records, newest first."""

    model_config = _example({"items": [_RECORD], "next_cursor": "WzE3MTQ1NTU4MDAwMDAwMDAsImFiIl0"})

    items: list[LoggedPrediction]
    next_cursor: str | None = Field(description="cursor of the next page; null: this is the last")


class LabelRequest(BaseModel):
    """An expert's label."""

    model_config = _example(
        {name: _LABEL[name] for name in ("prediction_id", "label", "labeller", "confidence", "comment")},
        extra="forbid",
    )

    prediction_id: str = Field(pattern=r"^[!-.0-~]{1,64}$")
    label: str = Field(max_length=64, description="one of the model's classes; see /v1/model")
    labeller: str | None = Field(None, description="who says so; default: the caller")
    confidence: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    comment: str | None = Field(None, description="at most 2000 characters")
    labelled_at: str | None = Field(None, description="ISO 8601; UTC without an offset; default: now")
    adjudication: bool = Field(
        False, description="settles what readers see differently; the labeller must not be one of them"
    )


class AcknowledgeRequest(BaseModel):
    """What there is to say to an acknowledged alarm."""

    model_config = _example({"comment": "patient was called in"}, extra="forbid")

    comment: str | None = Field(None, description="at most 2000 characters")


class Alarm(BaseModel):
    """One alarm; `detail` has the acknowledgement's comment under `acknowledgement`."""

    model_config = _example(_ALARM)

    id: int
    kind: str
    severity: str
    raised_at: datetime
    model_version: str | None
    message: str
    detail: dict[str, Any]
    acknowledged_at: datetime | None
    acknowledged_by: str | None
    topic: str | None = Field(None, description="what it is about")
    quieted_by: int | None = Field(
        None, description="the earlier alarm of this topic that said as much; an alarm that has one is not sent"
    )
    deliveries: dict[str, str] = Field(
        {}, description="by channel: pending, sent, failed (given up), or skipped (older than the channel)"
    )

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Alarm:
        times = {name: utc(row[name]) for name in ("raised_at", "acknowledged_at")}
        return cls(**{**{name: row[name] for name in cls.model_fields}, **times})


class AlarmPage(BaseModel):
    """Alarms, newest first."""

    model_config = _example({"items": [_ALARM], "next_cursor": None})

    items: list[Alarm]
    next_cursor: str | None


class HourCount(BaseModel):
    """Records of one hour that begins at `start`."""

    start: datetime
    predictions: int
    abstained: int


class DriftState(BaseModel):
    """The latest drift report of one model."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str
    window_start: datetime
    window_end: datetime
    status: str
    alarm: bool
    drifted: list[str]


class ShadowAgreement(BaseModel):
    """A champion's and a shadow's answers to the same lesions; shares and differences are null without any."""

    model_config = ConfigDict(protected_namespaces=())

    champion_version: str
    shadow_version: str
    pairs: int = Field(description="lesions that both gave a risk; the figures below are over these")
    champion_abstained: int = Field(description="lesions from which the champion alone abstained")
    shadow_abstained: int = Field(description="lesions from which the shadow alone abstained")
    mean_abs_difference: float | None = Field(description="of the risks")
    rank_correlation: float | None = Field(description="Spearman's, of the risks of the newest ranked_pairs pairs")
    ranked_pairs: int
    same_band: float | None = Field(description="share with the same band")
    raised: float | None = Field(description="share that is negative for the champion and positive for the shadow")
    lowered: float | None = Field(description="share that is positive for the champion and negative for the shadow")


class MonitoringSummary(BaseModel):
    """What the service did in the last hours, champion's records only, and how shadows agree with it."""

    model_config = _example(_SUMMARY)

    start: datetime
    end: datetime
    predictions: int
    abstained: int
    by_band: dict[str, int]
    by_model_version: dict[str, int]
    abstention_reasons: dict[str, int] = Field(description="one record may have several")
    per_hour: list[HourCount] = Field(description="oldest first; the last ends now")
    total_ms: dict[str, float] | None = Field(
        description="mean, median, p95 and p99 of the time to the commit, over the newest 10000 records of the window"
    )
    drift: list[DriftState] = Field(description="latest report per model, also from before the window")
    unacknowledged_alarms: dict[str, int] = Field(
        description="by kind, also from before the window; without those that an earlier one quiets"
    )
    labels: int = Field(description="labels dated within the window")
    missed_cancers: int = Field(description="alarms raised within the window")
    shadow: list[ShadowAgreement] = Field(description="per champion and shadow that scored lesions of the window")


class ErasureReport(BaseModel):
    """What a call removed; all zero where nothing was left."""

    model_config = _example(
        {
            "counts": {"alarms": 1, "labels": 2, "predictions": 3, "spooled": 0, "images": 3},
            "image_files": 3,
            "log_emptied": True,
            "pending": {"exports": 1, "datasets": 2},
        }
    )

    counts: dict[str, int] = Field(
        description="rows removed, by table; `alarms`: whose detail was blanked; `spooled`: records on their way"
    )
    image_files: int = Field(description="files removed, also those that an interrupted call left")
    log_emptied: bool = Field(
        description="false: a reader held SQLite's write-ahead log, which still has the rows; send the request again"
    )
    pending: dict[str, int] = Field(
        description="`exports` and `datasets` that the job erase_patient has still to look through for the patient"
    )
