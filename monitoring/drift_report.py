"""One window of the prediction log against a model's reference: which features moved, written down as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.schema import TaskSpec
from monitoring.drift_columns import Columns, drift_features
from monitoring.drift_segments import (
    Limits,
    SegmentDrift,
    find_segments,
    judge_embedding,
    judge_segments,
    mix_features,
)
from monitoring.drift_statistics import Feature, FeatureDrift, calibrate, judge, present
from monitoring.embedding_drift import EmbeddingDrift
from store.synced_files import replace_synced

# Part of every window's input digest: a window is judged again when the statistics change.
STATISTICS_VERSION = 4
EMBEDDING = "embedding"
# Categories that the reference lacks, named per feature in the report.
_MAX_UNSEEN = 20

Status = Literal["ok", "drift", "insufficient"]


class DriftSettings(BaseModel):
    """How a window is judged.

    Attributes:
        false_alarm_rate: chance that an unchanged window raises an alarm; half goes to the whole window, half to the
            institutions and devices in it (all to the whole where none can be judged), and of each half one half to the
            features together, one to the embedding.
        min_rows, min_groups: smaller windows are `insufficient` and raise no alarm; smaller segments are not judged.
        num_resamples: draws of patients behind the features' thresholds.
        num_splits: splits of the reference's patients behind the embedding's threshold.
        max_report_rows: rows per side that the Evidently report shows (a seeded sample); statistics use all.
        max_segments: institutions, and devices, that are judged each, those with most rows; 0: none.
        trailing_days: days before the window that a segment is compared with where the reference does not know it.
        max_trailing_rows: rows of them that are read.
    """

    model_config = ConfigDict(extra="forbid")

    false_alarm_rate: float = Field(0.01, gt=0.0, le=0.2)
    min_rows: int = Field(50, ge=2)
    min_groups: int = Field(10, ge=2)
    num_resamples: int = Field(1000, ge=100, le=100_000)
    num_splits: int = Field(40, ge=10, le=1000)
    max_report_rows: int = Field(20_000, ge=100, le=50_000)
    max_segments: int = Field(20, ge=0, le=1000)
    trailing_days: int = Field(14, ge=1, le=366)
    max_trailing_rows: int = Field(50_000, ge=1_000, le=1_000_000)
    seed: int = 0

    @property
    def limits(self) -> Limits:
        return Limits(self.min_rows, self.min_groups, self.max_segments, self.num_resamples, self.num_splits, self.seed)


@dataclass(frozen=True)
class WindowDrift:
    """The verdict on one window.

    Attributes:
        drifted: names of the features over their threshold, in report order; then `embedding`, `institution mix` and
            `device mix`, and what happened at which institution or device.
        features, embedding: every statistic with its threshold; empty and None for an insufficient window.
        not_judged: feature name to the reason why it was left out.
        segments: verdicts per institution and device.
        unseen: feature name to the window's categories that the reference lacks, with their rows.
    """

    status: Status
    num_rows: int
    num_groups: int
    drifted: list[str] = field(default_factory=list)
    features: list[FeatureDrift] = field(default_factory=list)
    embedding: EmbeddingDrift | None = None
    not_judged: dict[str, str] = field(default_factory=dict)
    segments: list[SegmentDrift] = field(default_factory=list)
    unseen: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def alarm(self) -> bool:
        return self.status == "drift"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> WindowDrift:
        """The inverse of `to_json`; what else stands there is left out."""
        own = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        own["features"] = [FeatureDrift(**feature) for feature in own["features"]]
        own["embedding"] = own["embedding"] and EmbeddingDrift(**own["embedding"])
        own["segments"] = [SegmentDrift.from_json(segment) for segment in own.get("segments", [])]
        return cls(**own)


def judge_window(
    reference: Columns,
    current: Columns,
    task: TaskSpec,
    settings: DriftSettings,
    trailing: Columns | None = None,
    was_seen: Callable[[str, str], bool] = lambda column, value: False,
) -> tuple[WindowDrift, list[Feature]]:
    """Compares the rows of a window with the reference, and its segments with theirs (see `find_segments`).

    Args:
        reference: a bundle's; current: of one model; trailing: of the days before, of the same model.
        was_seen: see `find_segments`.

    Returns:
        The verdict and the columns that it is about (empty for an insufficient window).
    """
    num_rows, num_groups = len(current), current.num_groups
    if num_rows < settings.min_rows or num_groups < settings.min_groups:
        return WindowDrift("insufficient", num_rows, num_groups), []
    limits = settings.limits
    segments = find_segments(reference, current, trailing, was_seen, limits) if settings.max_segments else []
    judged = any(segment.baseline is not None for segment in segments)
    share = settings.false_alarm_rate / (2 if judged else 1)
    verdict, features = _judge_whole(reference, current, trailing, task, share, limits)
    verdicts = judge_segments(segments, current, task, settings.false_alarm_rate - share, limits)
    drifted = verdict.drifted + [segment.headline for segment in verdicts if segment.headline is not None]
    status: Status = "drift" if drifted else "ok"
    return replace(verdict, status=status, drifted=drifted, segments=verdicts), features


def _judge_whole(
    reference: Columns, current: Columns, trailing: Columns | None, task: TaskSpec, rate: float, limits: Limits
) -> tuple[WindowDrift, list[Feature]]:
    columns = drift_features(reference, current, task)
    features = [item for item in columns if present(item.reference).any() and present(item.current).any()]
    calibration = calibrate(features, reference.groups, current.groups, limits.num_resamples, limits.seed)
    mix, least = mix_features(current, trailing, rate / 2, limits)
    verdicts, mixes = judge([calibration, mix], rate / 2)
    mixes = [raised(verdict, least[verdict.name]) for verdict in mixes]
    not_judged = {item.name: "no value in the window or none in the reference" for item in columns}
    not_judged |= {item.name: "too few values to know what chance does" for item in features}
    for verdict in verdicts:
        del not_judged[verdict.name]
    features = [item for item in features if item.name not in not_judged]
    embedding = judge_embedding(reference, current, rate / 2, limits)
    if embedding is None:
        not_judged[EMBEDDING] = "too few patients with an embedding"
    drifted = [verdict.name for verdict in verdicts if verdict.drifted]
    if embedding is not None and embedding.drifted:
        drifted.append(EMBEDDING)
    drifted += [verdict.name for verdict in mixes if verdict.drifted]
    size = (len(current), current.num_groups)
    # The mix is no feature of Evidently's report, whose other side is the reference.
    whole = WindowDrift("ok", *size, drifted, verdicts + mixes, embedding, not_judged, [], unseen_categories(features))
    return whole, features


def raised(verdict: FeatureDrift, least: float) -> FeatureDrift:
    """The verdict under a threshold of at least so much."""
    threshold = round(max(verdict.threshold, least), 6)
    return replace(verdict, threshold=threshold, drifted=verdict.distance >= threshold)


def unseen_categories(features: list[Feature]) -> dict[str, dict[str, int]]:
    """Rows of the window in categories that no row of the reference has, by feature; those with most rows."""
    found = {}
    for feature in features:
        if feature.kind != "categorical":
            continue
        counts = [
            np.bincount(side[present(side)], minlength=len(feature.categories))
            for side in (feature.reference, feature.current)
        ]
        new = np.flatnonzero((counts[0] == 0) & (counts[1] > 0))
        new = new[np.argsort(-counts[1][new], kind="stable")][:_MAX_UNSEEN]
        if len(new):
            found[feature.name] = {feature.categories[code]: int(counts[1][code]) for code in new}
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    replace_synced(path, (text + "\n").encode())
