"""Drift inside a window: per institution and per device, new ones of either, and their mix.

A camera that is changed at one of ten sites moves a tenth of the window's rows, which the whole hides.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student

from modeling.schema import TaskSpec
from monitoring.drift_columns import PLACES, Coded, Columns, coded_feature, drift_features
from monitoring.drift_statistics import Calibration, Feature, FeatureDrift, calibrate, distance, judge, present
from monitoring.embedding_drift import EmbeddingDrift, embedding_drift

# A segment's sides are thinned to so many rows for its thresholds: with forty segments the time is theirs.
MAX_SEGMENT_ROWS = 1_000
# Days with enough rows that it takes to know how the mix of places changes from day to day.
MIN_MIX_DAYS = 5
# Statistics that a report keeps of a segment: all drifted ones, and the nearest to their thresholds.
_KEPT = 5

SegmentStatus = Literal["ok", "drift", "new", "not_judged"]


@dataclass(frozen=True)
class SegmentDrift:
    """The verdict on the rows of one institution or device.

    Attributes:
        by: "institution" or "device"; value: which.
        baseline: what it was compared with, "reference" or "trailing days".
        drifted: features over their threshold; `embedding` stands last.
        features: the drifted ones, and those nearest to their threshold.
        reason: why it was not judged.
    """

    by: str
    value: str
    status: SegmentStatus
    num_rows: int
    num_groups: int
    baseline: str | None = None
    drifted: list[str] = field(default_factory=list)
    features: list[FeatureDrift] = field(default_factory=list)
    embedding: EmbeddingDrift | None = None
    reason: str | None = None

    @property
    def headline(self) -> str | None:
        """How an alarm names it; None where there is nothing to say."""
        if self.status == "new":
            return f"new {self.by} {self.value!r}: {self.num_rows} rows of {self.num_groups} patients"
        return f"{self.by} {self.value!r}: {', '.join(self.drifted)}" if self.status == "drift" else None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SegmentDrift:
        """The inverse of `dataclasses.asdict`."""
        features = [FeatureDrift(**feature) for feature in content["features"]]
        embedding = content["embedding"] and EmbeddingDrift(**content["embedding"])
        return cls(**{**content, "features": features, "embedding": embedding})


@dataclass(frozen=True)
class Limits:
    """What it takes to judge a segment; see `DriftSettings`."""

    min_rows: int
    min_groups: int
    max_segments: int
    num_resamples: int
    num_splits: int
    seed: int


@dataclass(frozen=True)
class Segment:
    """One place's rows in the window, bool (N,), and what they are compared with; `reason` is why they are not."""

    by: str
    value: str
    rows: np.ndarray
    num_groups: int
    baseline: Columns | None = None
    baseline_name: str | None = None
    is_new: bool = False
    reason: str | None = None


def find_segments(
    reference: Columns,
    current: Columns,
    trailing: Columns | None,
    was_seen: Callable[[str, str], bool],
    limits: Limits,
) -> list[Segment]:
    """The places of a window with rows and patients enough, the largest first.

    A place is compared with the reference's rows of it, else with its own trailing days: against the whole reference a
    site whose patients or camera always differ would raise an alarm every day. A place that neither knows is new, if
    the trailing days name places at all.

    Args:
        trailing: earlier rows of the same model; None where there are none.
        was_seen: whether an institution or device, (column, value), stands in any row of the trailing days, which the
            sample `trailing` may have missed.
    """
    segments: list[Segment] = []
    for by in PLACES:
        place = current.places[by]
        counts = np.bincount(place.codes[place.codes >= 0], minlength=len(place.names))
        largest = [int(code) for code in np.argsort(-counts, kind="stable") if counts[code] >= limits.min_rows]
        named = 0 if trailing is None else int((trailing.places[by].codes >= 0).sum())
        for code in largest[: limits.max_segments]:
            value, rows = place.names[code], place.codes == code
            size = (rows, len(np.unique(current.groups[rows])))
            candidates = [
                ("reference", _rows_of(reference, by, value)),
                ("trailing days", _rows_of(trailing, by, value)),
            ]
            fitting = [(name, side) for name, side in candidates if side is not None and _enough(side, limits)]
            if named >= limits.min_rows and not any(side for _, side in candidates) and not was_seen(by, value):
                segments.append(Segment(by, value, *size, is_new=True))
            elif size[1] < limits.min_groups:
                segments.append(Segment(by, value, *size, reason=f"under {limits.min_groups} patients"))
            elif counts[code] == len(current):
                segments.append(Segment(by, value, *size, reason="it is the whole window"))
            elif any(other.by != by and np.array_equal(other.rows, rows) for other in segments):
                segments.append(Segment(by, value, *size, reason="the rows of an institution above"))
            elif not fitting:
                reason = (
                    f"under {limits.min_rows} rows or {limits.min_groups} patients of it in reference and trailing days"
                )
                segments.append(Segment(by, value, *size, reason=reason))
            else:
                segments.append(Segment(by, value, *size, fitting[0][1], fitting[0][0]))
    return segments


def judge_segments(
    segments: list[Segment], current: Columns, task: TaskSpec, false_alarm_rate: float, limits: Limits
) -> list[SegmentDrift]:
    """Verdicts on the segments; the chance that any of them drifts unchanged is `false_alarm_rate`.

    Half of it goes to all features of all segments together (see `judge`), half to their embeddings, shared evenly.
    """
    compared = [segment for segment in segments if segment.baseline is not None]
    calibrations, embeddings = [], []
    for segment in compared:
        assert segment.baseline is not None
        # One at a time: together they would be the window twice more.
        columns = current.take(segment.rows)
        calibrations.append(_calibrate(segment, segment.baseline, columns, task, limits))
        rate = false_alarm_rate / 2 / len(compared)
        embeddings.append(judge_embedding(segment.baseline, columns, rate, limits, MAX_SEGMENT_ROWS))
    judged = zip(judge(calibrations, false_alarm_rate / 2), embeddings, strict=True)
    verdicts = []
    for segment in segments:
        size = (int(segment.rows.sum()), segment.num_groups)
        if segment.baseline is None:
            status: SegmentStatus = "new" if segment.is_new else "not_judged"
            verdicts.append(SegmentDrift(segment.by, segment.value, status, *size, reason=segment.reason))
            continue
        found, embedding = next(judged)
        drifted = [verdict.name for verdict in found if verdict.drifted]
        if embedding is not None and embedding.drifted:
            drifted.append("embedding")
        nearest = sorted(found, key=lambda verdict: verdict.threshold - verdict.distance)[:_KEPT]
        kept = [verdict for verdict in found if verdict.drifted or verdict in nearest]
        status = "drift" if drifted else "ok"
        verdicts.append(
            SegmentDrift(segment.by, segment.value, status, *size, segment.baseline_name, drifted, kept, embedding)
        )
    return verdicts


def judge_embedding(
    reference: Columns, current: Columns, false_alarm_rate: float, limits: Limits, max_rows: int | None = None
) -> EmbeddingDrift | None:
    """`embedding_drift` of the rows that have an embedding; None with too few patients."""
    if reference.embeddings is None or current.embeddings is None:
        return None
    values, groups = [], []
    for side in (reference, current):
        known = np.isfinite(side.embeddings).all(axis=1)
        whole = known.all()
        values.append(side.embeddings if whole else side.embeddings[known])
        groups.append(side.groups if whole else side.groups[known])
    if min(map(len, values)) == 0:
        return None
    return embedding_drift(*values, *groups, false_alarm_rate, limits.num_splits, limits.seed, max_rows)


def mix_features(
    current: Columns, trailing: Columns | None, false_alarm_rate: float, limits: Limits
) -> tuple[Calibration, dict[str, float]]:
    """How the rows spread over institutions and devices, against the trailing days.

    The reference is no measure of it: a gate split's centres are seldom those that send requests. Nor are patients
    alone: a mix changes with the day of the week, which patients drawn from a fortnight do not show.

    Returns:
        The features with their distances by chance, and the least threshold of each from the days (`day_threshold`).
    """
    empty = Calibration([], np.empty((0, limits.num_resamples)))
    if trailing is None or trailing.period is None:
        return empty, {}
    features, days = [], {}
    for by in PLACES:
        feature = coded_feature(f"{by} mix", trailing.places[by], current.places[by])
        if len(feature.categories) < 2 or not (present(feature.reference).any() and present(feature.current).any()):
            continue
        known = present(feature.reference)
        numbers, counts = np.unique(trailing.period[known], return_counts=True)
        full = numbers[counts >= limits.min_rows]
        if len(full) >= MIN_MIX_DAYS:
            features.append(feature)
            days[feature.name] = [_one_day(feature, trailing.period, day) for day in full]
    if not features:
        return empty, {}
    calibration = calibrate(features, trailing.groups, current.groups, limits.num_resamples, limits.seed + 1)
    return calibration, {name: day_threshold(distances, false_alarm_rate) for name, distances in days.items()}


def day_threshold(distances: list[float], false_alarm_rate: float) -> float:
    """The distance that one more day exceeds with this chance, after days of these distances (normal: Student's t)."""
    num = len(distances)
    spread = np.std(distances, ddof=1) * np.sqrt(1 + 1 / num)
    return float(np.mean(distances) + student.isf(false_alarm_rate, num - 1) * spread)


def _one_day(feature: Feature, period: np.ndarray, day: int) -> float:
    """The distance of one trailing day from the others."""
    others, own = feature.reference[period != day], feature.reference[period == day]
    return distance(Feature(feature.name, feature.kind, others, own, feature.categories))


def _calibrate(segment: Segment, baseline: Columns, columns: Columns, task: TaskSpec, limits: Limits) -> Calibration:
    features = [
        feature
        for feature in drift_features(baseline, columns, task)
        if present(feature.reference).any() and present(feature.current).any()
    ]
    # Draws of its own: the largest distance over segments takes them for independent.
    seed = zlib.crc32(f"{limits.seed}:{segment.by}:{segment.value}".encode())
    return calibrate(features, baseline.groups, columns.groups, limits.num_resamples, seed, MAX_SEGMENT_ROWS)


def _rows_of(side: Columns | None, by: str, value: str) -> Columns | None:
    place: Coded | None = None if side is None else side.places.get(by)
    if side is None or place is None or value not in place.names:
        return None
    rows = place.codes == place.names.index(value)
    return side.take(rows) if rows.any() else None


def _enough(side: Columns, limits: Limits) -> bool:
    return len(side) >= limits.min_rows and side.num_groups >= limits.min_groups
