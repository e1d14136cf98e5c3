"""Has a day's data moved away from the reference? Distances, and thresholds that know rows come in patients.

Rows of one patient resemble each other, so a day of 200 lesions holds far fewer than 200 independent ones and any
threshold for independent rows raises false alarms. Thresholds here come from resampling whole patients of the
reference: what distance do two samples of these sizes show when nothing has changed?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
STATISTIC_NAMES = {"numeric": "ks_distance", "categorical": "jensenshannon"}


@dataclass(frozen=True)
class Feature:
    """One column on both sides, where a row without a value does not count.

    Where missing values matter, make them a category.

    Attributes:
        reference, current: float (N,) and (M,) with NaN, or for categories int codes with -1, without a value.
        categories: what the codes stand for.
    """

    name: str
    kind: Kind
    reference: np.ndarray
    current: np.ndarray
    categories: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Measured:
    """A feature's distance over all rows, without its columns, which take a day's memory. n_*: rows with a value."""

    name: str
    statistic: str
    distance: float
    n_reference: int
    n_current: int


@dataclass(frozen=True)
class Calibration:
    """Features and the distances that they show by chance: `null` is float (F, num_resamples)."""

    features: list[Measured]
    null: np.ndarray


def categorical(name: str, reference: np.ndarray, current: np.ndarray) -> Feature:
    """A categorical feature of two str arrays with None where a row has no value."""
    categories = sorted({value for side in (reference, current) for value in side if value is not None})
    code = {value: index for index, value in enumerate(categories)} | {None: -1}
    sides = [np.array([code[value] for value in side], dtype=np.int32) for side in (reference, current)]
    return Feature(name, "categorical", *sides, tuple(categories))


def kolmogorov_smirnov(reference: np.ndarray, current: np.ndarray) -> float:
    """Largest gap between the two cumulative distributions, 0 to 1 (float arrays without NaN).

    Between two neighbours of the smaller side its distribution is flat and the other's rises, so the gap is largest at
    one of them, seen from the left or from the right: the larger side need not be searched for itself.
    """
    small, large = sorted((np.sort(reference), np.sort(current)), key=len)
    gaps = [
        np.searchsorted(small, small, side=side) / len(small) - np.searchsorted(large, small, side=side) / len(large)
        for side in ("left", "right")
    ]
    return float(np.abs(gaps).max())


def jensen_shannon(reference: np.ndarray, current: np.ndarray) -> float:
    """Jensen-Shannon distance of two category distributions: 0 equal, 0.83 disjoint (int codes from 0)."""
    num = int(max(reference.max(), current.max())) + 1
    counts = [np.bincount(side, minlength=num) for side in (reference, current)]
    return float(_jensen_shannon_counts(counts[0][None], counts[1][None])[0])


def distance(feature: Feature) -> float:
    """The feature's distance over the rows that have a value, to six places."""
    reference, current = (side[present(side)] for side in (feature.reference, feature.current))
    return round((kolmogorov_smirnov if feature.kind == "numeric" else jensen_shannon)(reference, current), 6)


def feature_drift(
    features: list[Feature],
    reference_groups: np.ndarray,
    current_groups: np.ndarray,
    false_alarm_rate: float,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[FeatureDrift]:
    """Judges the features; on an unchanged day the chance that any of them drifts is `false_alarm_rate`.

    See `calibrate` and `judge`.

    Args:
        features: columns of equal length per side, with at least one value on each.
        reference_groups, current_groups: the patient of each row, (N,) and (M,).
    """
    return judge([calibrate(features, reference_groups, current_groups, num_resamples, seed)], false_alarm_rate)[0]


def judge(calibrations: Sequence[Calibration], false_alarm_rate: float) -> list[list[FeatureDrift]]:
    """A verdict per feature; on an unchanged day the chance that any of them all drifts is `false_alarm_rate`.

    Each feature's distances by chance are divided by their 95 % quantile, the largest over the features is taken per
    draw, and its (1 - false_alarm_rate) quantile, times each feature's own, is the threshold (Westfall & Young 1993,
    max-T). Of B draws that quantile is the ceil((B + 1)(1 - false_alarm_rate))-th smallest, which one more draw exceeds
    with no more than that chance, and the largest where B is under 1/false_alarm_rate - 1. Calibrations of rows that
    have nothing in common, such as institutions, may share a judgement: as their draws are independent, the largest
    over all of one draw number is one of the whole.
    """
    units = [
        np.maximum(np.quantile(part.null, 0.95, axis=1), 1e-9) if part.features else np.empty(0)
        for part in calibrations
    ]
    parts = list(zip(calibrations, units, strict=True))
    largest = [(part.null / unit[:, None]).max(axis=0) for part, unit in parts if part.features]
    if not largest:
        return [[] for _ in calibrations]
    by_chance = np.sort(np.max(largest, axis=0))
    # Rounded: 1000 * 0.99 may come out above 990.
    place = math.ceil(round((len(by_chance) + 1) * (1.0 - false_alarm_rate), 6))
    factor = by_chance[min(place, len(by_chance)) - 1]
    return [
        [_verdict(feature, float(scale * factor)) for feature, scale in zip(part.features, unit, strict=True)]
        for part, unit in parts
    ]


def calibrate(
    features: list[Feature],
    reference_groups: np.ndarray,
    current_groups: np.ndarray,
    num_resamples: int = 1000,
    seed: int = 0,
    max_rows: int | None = None,
) -> Calibration:
    """What distances two samples show when nothing has changed.

    Two samples of whole patients, of the reference's and of the day's size, are drawn from the reference
    `num_resamples` times.

    Args:
        features: columns of equal length per side, with at least one value on each.
        reference_groups, current_groups: the patient of each row, (N,) and (M,).
        max_rows: a larger side is thinned to so many; None: `MAX_CALIBRATION_ROWS`.

    Returns:
        The features in order, without those whose few values are all of patients that thinning left out on one side:
        no distance of theirs could be resampled.
    """
    rng = np.random.default_rng(seed)
    reference_codes, keep_reference = _thin(reference_groups, max_rows or MAX_CALIBRATION_ROWS, rng)
    current_codes, keep_current = _thin(current_groups, max_rows or MAX_CALIBRATION_ROWS, rng)
    features = [
        feature
        for feature in features
        if present(feature.reference[keep_reference]).any() and present(feature.current[keep_current]).any()
    ]
    null = np.empty((len(features), num_resamples))
    if not features:
        return Calibration([], null)
    draws = _Draws(rng, num_resamples, reference_codes.max() + 1, current_codes.max() + 1)
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
    return Calibration([_measure(feature) for feature in features], null)


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
    return np.concatenate([values, np.repeat(np.array(added, dtype=values.dtype), size)]), np.concatenate(
        [groups, np.repeat(new_groups, size)]
    )


def _measure(feature: Feature) -> Measured:
    num_reference, num_current = (int(present(side).sum()) for side in (feature.reference, feature.current))
    return Measured(feature.name, STATISTIC_NAMES[feature.kind], distance(feature), num_reference, num_current)


def _verdict(found: Measured, threshold: float) -> FeatureDrift:
    threshold = round(max(threshold, MINIMUM_DISTANCE), 6)
    drifted = found.distance >= threshold
    return FeatureDrift(
        found.name, found.statistic, found.distance, threshold, drifted, found.n_reference, found.n_current
    )


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
    return ~np.isnan(values) if values.dtype.kind == "f" else values >= 0


def _thin(groups: np.ndarray, max_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whole patients at random until `max_rows` are full: int codes (n,) of the rows kept, bool (N,) which they are."""
    codes, num = _codes(groups)
    counts = np.bincount(codes)
    order = rng.permutation(num)
    kept = order[np.cumsum(counts[order]) <= max_rows] if counts.sum() > max_rows else order
    keep = np.isin(codes, kept if len(kept) else order[:1])
    return _codes(codes[keep])[0], keep
