"""One window of the prediction log against a model's reference: which features moved, written down as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.schema import CONTEXTS, TaskSpec
from monitoring.drift_statistics import Feature, FeatureDrift, feature_drift, present
from monitoring.embedding_drift import EmbeddingDrift, embedding_drift
from monitoring.prediction_log import EMBEDDING_NAMES, QUALITY_NAMES
from store.synced_files import sync_folder, write_synced

if TYPE_CHECKING:
    import pandas as pd

# Part of every window's input digest: a window is judged again when the statistics change.
STATISTICS_VERSION = 1
EMBEDDING = "embedding"
_MISSING = "(missing)"

Status = Literal["ok", "drift", "insufficient"]


class DriftSettings(BaseModel):
    """How a window is judged.

    Attributes:
        false_alarm_rate: chance that an unchanged window raises an alarm; half goes to the features together, half to
            the embedding.
        min_rows, min_groups: smaller windows are `insufficient` and raise no alarm.
        num_resamples: draws of patients behind the features' thresholds.
        num_splits: splits of the reference's patients behind the embedding's threshold.
        max_report_rows: rows per side that the Evidently report shows (a seeded sample); statistics use all.
    """

    model_config = ConfigDict(extra="forbid")

    false_alarm_rate: float = Field(0.01, gt=0.0, le=0.2)
    min_rows: int = Field(50, ge=2)
    min_groups: int = Field(10, ge=2)
    num_resamples: int = Field(1000, ge=100, le=100_000)
    num_splits: int = Field(40, ge=10, le=1000)
    max_report_rows: int = Field(20_000, ge=100)
    seed: int = 0


@dataclass(frozen=True)
class WindowDrift:
    """The verdict on one window.

    Attributes:
        drifted: names of the features over their threshold, in report order; `embedding` stands last.
        features, embedding: every statistic with its threshold; empty and None for an insufficient window.
        not_judged: feature name to the reason why it was left out.
    """

    status: Status
    num_rows: int
    num_groups: int
    drifted: list[str] = field(default_factory=list)
    features: list[FeatureDrift] = field(default_factory=list)
    embedding: EmbeddingDrift | None = None
    not_judged: dict[str, str] = field(default_factory=dict)

    @property
    def alarm(self) -> bool:
        return self.status == "drift"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> WindowDrift:
        """The inverse of `to_json`."""
        features = [FeatureDrift(**feature) for feature in content["features"]]
        embedding = content["embedding"] and EmbeddingDrift(**content["embedding"])
        return cls(**{**content, "features": features, "embedding": embedding})


def judge_window(
    reference: pd.DataFrame, current: pd.DataFrame, task: TaskSpec, settings: DriftSettings
) -> tuple[WindowDrift, list[Feature]]:
    """Compares the rows of a window with the reference.

    Args:
        reference: a bundle's `reference()`.
        current: `PredictionLog.read_window`, rows of one model.

    Returns:
        The verdict and the columns that it is about (empty for an insufficient window).
    """
    num_rows, num_groups = len(current), int(current["group"].nunique()) if len(current) else 0
    if num_rows < settings.min_rows or num_groups < settings.min_groups:
        return WindowDrift("insufficient", num_rows, num_groups), []
    columns = drift_features(reference, current, task)
    features = [item for item in columns if present(item.reference).any() and present(item.current).any()]
    reference_groups, current_groups = reference["group"].to_numpy(), current["group"].to_numpy(dtype=str)
    share = settings.false_alarm_rate / 2
    verdicts = feature_drift(
        features, reference_groups, current_groups, share, settings.num_resamples, seed=settings.seed
    )
    not_judged = {item.name: "no value in the window or none in the reference" for item in columns}
    not_judged |= {item.name: "too few values to know what chance does" for item in features}
    for verdict in verdicts:
        del not_judged[verdict.name]
    features = [item for item in features if item.name not in not_judged]
    embedding = _judge_embedding(reference, current, share, settings)
    if embedding is None:
        not_judged[EMBEDDING] = "too few patients with an embedding"
    drifted = [verdict.name for verdict in verdicts if verdict.drifted]
    if embedding is not None and embedding.drifted:
        drifted.append(EMBEDDING)
    status: Status = "drift" if drifted else "ok"
    return WindowDrift(status, num_rows, num_groups, drifted, verdicts, embedding, not_judged), features


def drift_features(reference: pd.DataFrame, current: pd.DataFrame, task: TaskSpec) -> list[Feature]:
    """The columns to compare: scores, image quality, metadata, and whether metadata is missing.

    Risks are compared per context, since a risk from the image alone is distributed otherwise. Requests without
    metadata (`image_only`) say nothing about metadata columns.
    """
    context = current["context"].to_numpy()
    features = [_numeric("image_score", reference["image_score"], current["image_score"])]
    for name in CONTEXTS:
        if f"risk_{name}" in reference and (context == name).any():
            risk = np.where(context == name, _floats(current["risk"]), np.nan)
            features.append(Feature(f"risk_{name}", "numeric", _floats(reference[f"risk_{name}"]), risk))
    features += [_numeric(name, reference[name], current[name]) for name in QUALITY_NAMES if name in reference]
    asked = context != "image_only"
    for name, spec in task.columns.items():
        if name not in reference or not asked.any():
            continue
        sent = current[f"meta.{name}"] if f"meta.{name}" in current else np.full(len(current), None, dtype=object)
        if spec.kind == "categorical":
            categories = _categories(sent)
            categories[~asked] = None
            features.append(Feature(name, "categorical", _categories(reference[name]), categories))
            continue
        values = np.where(asked, _floats(sent), np.nan)
        known = _floats(reference[name])
        features.append(Feature(name, "numeric", known, values))
        if np.isnan(known).any() or np.isnan(values[asked]).any():
            presence = _presence(values)
            presence[~asked] = None
            features.append(Feature(f"{name} missing", "categorical", _presence(known), presence))
    return features


def _judge_embedding(
    reference: pd.DataFrame, current: pd.DataFrame, false_alarm_rate: float, settings: DriftSettings
) -> EmbeddingDrift | None:
    names = [name for name in EMBEDDING_NAMES if name in reference]
    if not names:
        return None
    sides = [side[np.isfinite(side[names].to_numpy()).all(axis=1)] for side in (reference, current)]
    return embedding_drift(
        *(side[names].to_numpy() for side in sides),
        *(side["group"].to_numpy() for side in sides),
        false_alarm_rate,
        settings.num_splits,
        settings.seed,
    )


def _numeric(name: str, reference: Any, current: Any) -> Feature:
    return Feature(name, "numeric", _floats(reference), _floats(current))


def _floats(values: Any) -> np.ndarray:
    import pandas as pd

    numbers = np.array(pd.to_numeric(pd.Series(values), errors="coerce"), dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _categories(values: Any) -> np.ndarray:
    import pandas as pd

    return np.array([_MISSING if pd.isna(value) else str(value) for value in values], dtype=object)


def _presence(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), "missing", "present").astype(object)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    write_synced(path, (text + "\n").encode())
    sync_folder(path.parent)
