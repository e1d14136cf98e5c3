"""Every route of the service as a `Call`: how its request is written, and what its answer is read as."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypedDict, TypeVar
from urllib.parse import quote, unquote

import httpx
from pydantic import TypeAdapter

from serve.api import REPLAYED_AT, Health, ModelCard, Prediction, Problem, View
from serve.client_exchange import Call
from serve.client_images import Image
from serve.record_api import (
    Alarm,
    AlarmPage,
    ErasureReport,
    Label,
    LabelledPrediction,
    MonitoringSummary,
    PredictionPage,
)
from serve.submission_api import Submission, SubmissionAccepted
from serve.training_api import (
    Approval,
    Candidate,
    Rejection,
    RetrainAccepted,
    Retraining,
    RetrainingPage,
    RollbackAsked,
    Trigger,
)
from serve.triage_api import Triage

Metadata = Mapping[str, float | str | None]

Answer = TypeVar("Answer")


class LesionOrigin(TypedDict, total=False):
    """Where pictures come from, and the key under which repeats get one answer; the client makes one unless given.

    `replayed_at`: when the service is to count the request as received, see `serve.replays`.
    """

    institution: str | None
    device: str | None
    acquired_at: datetime | str | None
    replayed_at: datetime | str | None
    idempotency_key: str | None


class PatientOrigin(LesionOrigin, total=False):
    """As `LesionOrigin`, and whose lesions they are; the service stores a keyed hash of `patient_id`."""

    patient_id: str | None


class PredictionFilters(TypedDict, total=False):
    """What the records of `predictions` have in common; see `serve.record_query.PredictionQuery`."""

    from_: datetime | str
    to: datetime | str
    model_version: str
    band: Literal["low", "moderate", "high"]
    abstained: bool
    context: Literal["image_only", "none", "patient"]
    institution: str
    device: str
    patient_id: str
    role: Literal["champion", "shadow"]
    labelled: bool
    label_state: Literal["single", "agreed", "disagreed", "adjudicated"]
    min_risk: float
    max_risk: float
    limit: int


@dataclass(frozen=True)
class Picture:
    """An image file as the service stored it."""

    data: bytes
    media_type: str


@dataclass(frozen=True)
class EvidenceMap:
    """Where the network sees evidence for a class.

    Attributes:
        png: the file.
        digest: sha256 of the manifest of the model's bundle.
        reasons: why the model gives no risk for this picture; empty where it does.
    """

    png: bytes
    model_version: str
    digest: str
    target_class: str
    reasons: tuple[str, ...]


def _into(kind: Any) -> Any:
    adapter = TypeAdapter(kind)
    return lambda response: adapter.validate_json(response.content)


def _text(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _text(value) for name, value in values.items() if value is not None}


def _segment(text: str) -> str:
    return quote(text, safe="")


def _form(
    path: str,
    kind: Any,
    images: list[tuple[str, Image]],
    metadata: Any,
    origin: PatientOrigin,
) -> Call[Any]:
    """A form with pictures, under a key of its own."""
    fields = dict(origin)
    headers = {"Idempotency-Key": fields.pop("idempotency_key", None) or uuid.uuid4().hex}
    if (replayed_at := fields.pop("replayed_at", None)) is not None:
        headers[REPLAYED_AT] = replayed_at.isoformat() if isinstance(replayed_at, datetime) else str(replayed_at)
    form = _given(fields) | ({} if metadata is None else {"metadata": json.dumps(metadata, allow_nan=False)})
    return Call(
        "POST",
        path,
        _into(kind),
        {"data": form, "headers": headers},
        tuple(images),
    )


def predict(image: Image, metadata: Metadata | None, origin: PatientOrigin) -> Call[Prediction]:
    return _form("/v1/predict", Prediction, [("image", image)], metadata, origin)


def predict_batch(
    images: Sequence[Image], metadata: Sequence[Metadata | None] | None, origin: PatientOrigin
) -> Call[list[Prediction | Problem]]:
    files = [("images", image) for image in images]
    return _form("/v1/predict/batch", list[Prediction | Problem], files, metadata, origin)


def triage(
    images: Sequence[Image], patient_id: str, metadata: Sequence[Metadata | None] | None, origin: LesionOrigin
) -> Call[Triage]:
    files = [("images", image) for image in images]
    return _form("/v1/patients/triage", Triage, files, metadata, {**origin, "patient_id": patient_id})


def submit(image: Image, metadata: Metadata | None, origin: PatientOrigin) -> Call[SubmissionAccepted]:
    return _form("/v1/submissions", SubmissionAccepted, [("image", image)], metadata, origin)


def explain(image: Image, view: View, target_class: str | None) -> Call[EvidenceMap]:
    def decode(response: httpx.Response) -> EvidenceMap:
        headers = response.headers
        return EvidenceMap(
            png=response.content,
            model_version=unquote(headers["X-Dermray-Model-Version"]),
            digest=headers["X-Dermray-Digest"],
            target_class=unquote(headers["X-Dermray-Class"]),
            reasons=tuple(filter(None, headers.get("X-Dermray-Abstained", "").split(", "))),
        )

    content = {"data": _given({"view": view, "target_class": target_class})}
    return Call("POST", "/v1/explain", decode, content, (("image", image),))


def submission(submission_id: str) -> Call[Submission]:
    return Call("GET", f"/v1/submissions/{_segment(submission_id)}", _into(Submission))


def prediction_page(filters: PredictionFilters, cursor: str | None) -> Call[PredictionPage]:
    params = {name.rstrip("_"): value for name, value in filters.items()}
    return Call("GET", "/v1/predictions", _into(PredictionPage), {"params": _given({**params, "cursor": cursor})})


def prediction(prediction_id: str) -> Call[LabelledPrediction]:
    return Call("GET", f"/v1/predictions/{_segment(prediction_id)}", _into(LabelledPrediction))


def image(prediction_id: str) -> Call[Picture]:
    def decode(response: httpx.Response) -> Picture:
        return Picture(response.content, response.headers.get("Content-Type", "application/octet-stream"))

    return Call("GET", f"/v1/predictions/{_segment(prediction_id)}/image", decode)


def label(
    prediction_id: str,
    label: str,
    labeller: str | None,
    confidence: float | None,
    comment: str | None,
    labelled_at: datetime | str | None,
    adjudication: bool,
) -> Call[Label]:
    """Repeatable: the service stores a labeller's label once that says what the one before it says."""
    body = {
        "prediction_id": prediction_id,
        "label": label,
        "labeller": labeller,
        "confidence": confidence,
        "comment": comment,
        "labelled_at": labelled_at,
        "adjudication": adjudication or None,
    }
    return Call("POST", "/v1/labels", _into(Label), {"json": _given(body)})


def alarm_page(
    unacknowledged: bool, kind: str | None, quieted: bool | None, limit: int, cursor: str | None
) -> Call[AlarmPage]:
    filters = {"unacknowledged": unacknowledged, "kind": kind, "quieted": quieted}
    params = _given({**filters, "limit": limit, "cursor": cursor})
    return Call("GET", "/v1/alarms", _into(AlarmPage), {"params": params})


def acknowledge(alarm_id: int, comment: str | None) -> Call[Alarm]:
    """Repeatable: the first to acknowledge an alarm stays on record."""
    return Call("POST", f"/v1/alarms/{alarm_id}/acknowledge", _into(Alarm), {"json": _given({"comment": comment})})


def summary(hours: int) -> Call[MonitoringSummary]:
    return Call("GET", "/v1/monitoring/summary", _into(MonitoringSummary), {"params": {"hours": hours}})


def erase_patient(patient_id: str) -> Call[ErasureReport]:
    return Call("DELETE", f"/v1/patients/{_segment(patient_id)}", _into(ErasureReport))


def retrain(reason: str, trigger: Trigger) -> Call[RetrainAccepted]:
    """Not repeatable: the request may have been carried out, and closed, before it is repeated."""
    body = {"reason": reason, "trigger": trigger}
    return Call("POST", "/v1/retrain", _into(RetrainAccepted), {"json": body}, repeatable=False)


def retrain_request(retrain_id: str) -> Call[Retraining]:
    return Call("GET", f"/v1/retrain/{_segment(retrain_id)}", _into(Retraining))


def retraining_page(limit: int, cursor: str | None) -> Call[RetrainingPage]:
    params = _given({"limit": limit, "cursor": cursor})
    return Call("GET", "/v1/retrain", _into(RetrainingPage), {"params": params})


def candidates() -> Call[list[Candidate]]:
    return Call("GET", "/v1/candidates", _into(list[Candidate]))


def approve(version: str, reason: str) -> Call[Approval]:
    """Not repeatable: once the candidate is promoted, a repeat would say that the approval failed."""
    path = f"/v1/candidates/{_segment(version)}/approve"
    return Call("POST", path, _into(Approval), {"json": {"reason": reason}}, repeatable=False)


def reject(version: str, reason: str) -> Call[Rejection]:
    """Not repeatable: a repeat would say that the candidate was rejected already."""
    path = f"/v1/candidates/{_segment(version)}/reject"
    return Call("POST", path, _into(Rejection), {"json": {"reason": reason}}, repeatable=False)


def ask_rollback(version: str, reason: str) -> Call[RollbackAsked]:
    """Not repeatable: once it is done, a repeat would say that the version is not the champion."""
    body = {"model_version": version, "reason": reason}
    return Call("POST", "/v1/champion/rollback", _into(RollbackAsked), {"json": body}, repeatable=False)


def model() -> Call[ModelCard]:
    return Call("GET", "/v1/model", _into(ModelCard))


def ready() -> Call[Health]:
    return Call("GET", "/readyz", _into(Health), answers=frozenset({503}), once=True)
