"""Has a day's data moved away from the reference? Distances, and thresholds that know rows come in patients.

Rows of one patient resemble each other, so a day of 200 lesions holds far fewer than 200 independent ones and any
threshold for independent rows raises false alarms. Thresholds here come from resampling whole patients of the
reference: what distance do two samples of these sizes show when nothing has changed?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial.distance import jensenshannon

Kind = Literal["numeric", "categorical"]

# Below this no distance raises an alarm, however many rows make it significant (also Evidently's own default).
MINIMUM_DISTANCE = 0.1
# A larger side is thinned to this many rows, by whole patients, for calibration: the threshold is then the one of a
# side this large, which only misses shifts too small to matter.
MAX_CALIBRATION_ROWS = 4_000
MAX_CLASSIFIER_ROWS = 2_000
STATISTIC_NAMES = {"numeric": "ks_distance", "categorical": "jensenshannon"}


@dataclass(frozen=True)
class Feature:
    """One column on both sides: float arrays with NaN, or object arrays of str with None, where a row has no value.

    Rows without a value do not count. Where missing values matter, make them a category.
    """

    name: str
    kind: Kind
    reference: np.ndarray
    current: np.ndarray


@dataclass(frozen=True)
class FeatureDrift:
    """The verdict on one feature: drifted = distance >= threshold. n_*: rows with a value."""

    name: str
    statistic: str
    distance: float
    threshold: float
    drifted: bool
    n_reference: int
    n_current: int


def kolmogorov_smirnov(reference: np.ndarray, current: np.ndarray) -> float:
    """Largest gap between the two cumulative distributions, 0 to 1 (float arrays without NaN)."""
    values = np.sort(np.concatenate([reference, current]))
    gaps = [np.searchsorted(np.sort(side), values, side="right") / len(side) for side in (reference, current)]
    return float(np.abs(gaps[0] - gaps[1]).max())


def jensen_shannon(reference: np.ndarray, current: np.ndarray) -> float:
    """Jensen-Shannon distance of two category distributions: 0 equal, 0.83 disjoint (str arrays)."""
    codes, num = _codes(np.concatenate([reference, current]))
    of_reference = np.bincount(codes[: len(reference)], minlength=num)
    of_current = np.bincount(codes[len(reference) :], minlength=num)
    return float(_jensen_shannon_counts(of_reference[None], of_current[None])[0])


def feature_drift(
    features: list[Feature],
    reference_groups: np.ndarray,
    current_groups: np.ndarray,
    false_alarm_rate: float,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[FeatureDrift]:
    """Judges the features; on an unchanged day the chance that any of them drifts is `false_alarm_rate`.

    Two samples of whole patients, of the reference's and of the day's size, are drawn from the reference
    `num_resamples` times. Each feature's distances are divided by their 95 % quantile, the largest over the features
    is taken per draw, and its (1 - false_alarm_rate) quantile, times each feature's own, is the threshold.

    Args:
        features: columns of equal length per side, with at least one value on each.
        reference_groups, current_groups: the patient of each row, (N,) and (M,).

    Returns:
        A verdict per feature, in order, without those whose few values are all of patients that calibration left out
        on one side: no distance of theirs could be resampled.
    """
    rng = np.random.default_rng(seed)
    reference_codes, keep_reference = _thin(reference_groups, MAX_CALIBRATION_ROWS, rng)
    current_codes, keep_current = _thin(current_groups, MAX_CALIBRATION_ROWS, rng)
    features = [
        feature
        for feature in features
        if present(feature.reference[keep_reference]).any() and present(feature.current[keep_current]).any()
    ]
    if not features:
        return []
    draws = _Draws(rng, num_resamples, reference_codes.max() + 1, current_codes.max() + 1)
    null = np.empty((len(features), num_resamples))
    for index, feature in enumerate(features):
        reference, current = feature.reference[keep_reference], feature.current[keep_current]
        has_value, known_current = present(reference), present(current)
        values, groups = reference[has_value], reference_codes[has_value]
        sizes = np.bincount(current_codes[known_current])
        num_drawn = len(np.unique(groups))
        if feature.kind == "categorical":
            values, groups = _with_imaginary_patients(values, groups, current[known_current])
        distances = _kolmogorov_smirnov_weighted if feature.kind == "numeric" else _jensen_shannon_weighted
        null[index] = distances(values, draws.row_weights(groups, sizes[sizes > 0], num_drawn))
    unit = np.maximum(np.quantile(null, 0.95, axis=1), 1e-9)
    factor = np.quantile((null / unit[:, None]).max(axis=0), 1.0 - false_alarm_rate)
    return [_verdict(feature, float(scale * factor)) for feature, scale in zip(features, unit, strict=True)]


def _with_imaginary_patients(
    values: np.ndarray, groups: np.ndarray, current: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Adds one patient for each category that fewer than three patients of the reference show.

    Resampling never draws what the reference lacks, so the first patient without an age would be an alarm; but none
    among 25 patients does not make it impossible. This is Laplace's rule of succession, with patients for counts.
    """
    size = max(1, round(len(groups) / len(np.unique(groups))))
    added = []
    for category in np.unique(np.concatenate([values, current])):
        if len(np.unique(groups[values == category])) < 3:
            added.append(category)
    new_groups = groups.max() + 1 + np.arange(len(added))
    return np.concatenate([values, np.repeat(np.array(added, dtype=object), size)]), np.concatenate(
        [groups, np.repeat(new_groups, size)]
    )


def _verdict(feature: Feature, threshold: float) -> FeatureDrift:
    reference, current = (side[present(side)] for side in (feature.reference, feature.current))
    distance = round((kolmogorov_smirnov if feature.kind == "numeric" else jensen_shannon)(reference, current), 6)
    threshold = round(max(threshold, MINIMUM_DISTANCE), 6)
    name, drifted = STATISTIC_NAMES[feature.kind], distance >= threshold
    return FeatureDrift(feature.name, name, distance, threshold, drifted, len(reference), len(current))


_Weights = Iterable[tuple[np.ndarray, np.ndarray]]


class _Draws:
    """Random draws of patients, shared by all features so that the largest distance sees how they move together."""

    def __init__(self, rng: np.random.Generator, num_resamples: int, num_reference: int, num_current: int):
        self._reference = rng.random((num_resamples, num_reference))
        self._current = rng.random((num_resamples, num_current))
        self._offset = rng.random((num_resamples, num_current))
        self._rng = rng
        self._kept: tuple[bytes, list[tuple[np.ndarray, np.ndarray]]] = (b"", [])

    def row_weights(self, groups: np.ndarray, sizes: np.ndarray, num_drawn: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """How often each reference row stands in each drawn sample, some resamples at a time.

        Features without missing values ask for the same weights one after the other, so the last ones are kept.

        Args:
            groups: int (N,) patient codes of the reference rows; sizes: int (K,) rows per patient of the day.
            num_drawn: patients in a reference-sized sample.

        Returns:
            float32 (B, N) weights of the reference-sized and of the day-sized sample, in the order of the resamples.
        """
        key = groups.tobytes() + b"|" + sizes.tobytes()
        if self._kept[0] != key:
            self._kept = (key, list(self._row_weights(groups, sizes, num_drawn)))
        return self._kept[1]

    def _row_weights(self, groups: np.ndarray, sizes: np.ndarray, num_drawn: int) -> _Weights:
        """Draws the samples.

        A drawn day has as many patients as the day and, of each, as many rows: distinct rows of the drawn patient, and
        repeats only where the reference has fewer.
        """
        # Rows in random order within their patient: any run of consecutive rows is then a random subset.
        order = np.lexsort((self._rng.random(len(groups)), groups))
        _, codes, counts = np.unique(groups[order], return_inverse=True, return_counts=True)
        starts = np.cumsum(counts) - counts
        patient = np.repeat(np.arange(len(sizes)), sizes)
        within = np.arange(len(patient)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        num_rows, num_groups = len(groups), len(counts)
        original = np.argsort(order)
        step = max(1, 2_000_000 // (num_rows + len(patient)))
        for first in range(0, len(self._reference), step):
            part = slice(first, min(first + step, len(self._reference)))
            drawn = (self._reference[part, :num_drawn] * num_groups).astype(np.int64)
            of_reference = _count_rows(drawn, num_groups)[:, codes]
            drawn = (self._current[part, : len(sizes)] * num_groups).astype(np.int64)
            offset = (self._offset[part, : len(sizes)] * counts[drawn]).astype(np.int64)
            rows = starts[drawn][:, patient] + (offset[:, patient] + within) % counts[drawn][:, patient]
            of_current = _count_rows(rows, num_rows)
            yield of_reference[:, original], of_current[:, original]


def _count_rows(rows: np.ndarray, num: int) -> np.ndarray:
    """How often each of `num` numbers stands in each line of int (B, M): float32 (B, num)."""
    flat = rows + num * np.arange(len(rows))[:, None]
    return np.bincount(flat.ravel(), minlength=num * len(rows)).reshape(len(rows), num).astype(np.float32)


def _kolmogorov_smirnov_weighted(values: np.ndarray, weights: _Weights) -> np.ndarray:
    """`kolmogorov_smirnov` between weighted copies of one sample, for every resample."""
    order = np.argsort(values, kind="stable")
    last_of_ties = np.flatnonzero(np.append(np.diff(values[order]) > 0, True))
    distances = []
    for reference, current in weights:
        gap = reference / reference.sum(axis=1, keepdims=True) - current / current.sum(axis=1, keepdims=True)
        distances.append(np.abs(np.cumsum(gap[:, order], axis=1)[:, last_of_ties]).max(axis=1))
    return np.concatenate(distances)


def _jensen_shannon_weighted(values: np.ndarray, weights: _Weights) -> np.ndarray:
    """`jensen_shannon` between weighted copies of one sample, for every resample."""
    codes, num = _codes(values)
    rows_of = [np.flatnonzero(codes == code) for code in range(num)]
    distances = []
    for sides in weights:
        counts = [np.stack([side[:, rows].sum(axis=1) for rows in rows_of], axis=1) for side in sides]
        distances.append(_jensen_shannon_counts(*counts))
    return np.concatenate(distances)


def _jensen_shannon_counts(reference: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance (natural logarithm) of counts (B, K) and (B, K): float (B,)."""
    return jensenshannon(reference.astype(np.float64), current.astype(np.float64), axis=1)


def _codes(values: np.ndarray) -> tuple[np.ndarray, int]:
    unique, codes = np.unique(values, return_inverse=True)
    return codes, len(unique)


def present(values: np.ndarray) -> np.ndarray:
    """Bool (N,): which rows of a feature's column have a value."""
    return ~np.isnan(values) if values.dtype.kind == "f" else np.not_equal(values, None).astype(bool)


def _thin(groups: np.ndarray, max_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whole patients at random until `max_rows` are full: int codes (n,) of the rows kept, bool (N,) which they are."""
    codes, num = _codes(groups)
    counts = np.bincount(codes)
    order = rng.permutation(num)
    kept = order[np.cumsum(counts[order]) <= max_rows] if counts.sum() > max_rows else order
    keep = np.isin(codes, kept if len(kept) else order[:1])
    return _codes(codes[keep])[0], keep
