"""Risk thresholds that reach a sensitivity, and the bands between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from modeling.patient_relative import group_codes

_LOW_BAND_SENSITIVITY, _HIGH_BAND_SENSITIVITY = 0.95, 0.80


class OperatingPoint(BaseModel):
    """A sensitivity reached on the calibration rows, the risk threshold that reaches it and its specificity there.

    `sensitivity_low`: with 95 % confidence the sensitivity on new lesions is above it, if they are like these. The
    threshold being the k'th highest of n independent malignant risks, the sensitivity it has is distributed as
    Beta(k, n - k + 1) whatever the risks are; this is its 5 % quantile, which is also Clopper and Pearson's bound.
    Cancers of one patient are not independent: n is the number of patients (groups) with one and k their share, as if
    each had one cancer. None in models of before.
    """

    sensitivity: float
    threshold: float
    specificity: float
    sensitivity_low: float | None = None


class Thresholds(BaseModel):
    """Risk thresholds by sensitivity. `threshold` is the operating point's: risk >= threshold asks for a biopsy."""

    operating_sensitivity: float
    threshold: float
    points: list[OperatingPoint]

    def at(self, sensitivity: float) -> float:
        """The threshold chosen for a sensitivity.

        Raises:
            ValueError: no threshold was chosen for it.
        """
        for point in self.points:
            if abs(point.sensitivity - sensitivity) < 1e-9:
                return point.threshold
        raise ValueError(f"no threshold for sensitivity {sensitivity}; chosen: {[p.sensitivity for p in self.points]}")

    def band(self, risk: float) -> str:
        """ "low" below the threshold for 95 % sensitivity, "high" from the one for 80 %, "moderate" between."""
        if risk >= self.at(_HIGH_BAND_SENSITIVITY):
            return "high"
        return "moderate" if risk >= self.at(_LOW_BAND_SENSITIVITY) else "low"


def choose_thresholds(
    labels: np.ndarray,
    risk: np.ndarray,
    sensitivities: Sequence[float],
    operating: float,
    groups: Sequence | None = None,
) -> Thresholds:
    """The highest threshold that still reaches each sensitivity on these rows.

    Args:
        labels: 0/1 (N,), 1 = malignant.
        risk: calibrated risk (N,), out of fold.
        sensitivities: in (0, 1]; 0.80 and 0.95, which bound the bands, are always added.
        operating: the sensitivity to work at.
        groups: (N,), which lesions are not independent; None = all are.

    Raises:
        ValueError: no malignant or no benign row, or a sensitivity out of range.
    """
    labels, risk = np.asarray(labels).astype(bool), np.asarray(risk, dtype=np.float64)
    if labels.all() or not labels.any():
        raise ValueError(
            f"{int(labels.sum())} of {len(labels)} lesions are malignant; thresholds need malignant and benign ones"
        )
    from scipy.stats import beta

    positives = np.sort(risk[labels])[::-1]
    independent = len(positives)
    if groups is not None:
        independent = len(np.unique(group_codes(groups)[labels]))
    points = []
    for sensitivity in sorted({*sensitivities, operating, _LOW_BAND_SENSITIVITY, _HIGH_BAND_SENSITIVITY}):
        if not 0 < sensitivity <= 1:
            raise ValueError(f"sensitivity is {sensitivity}; expected a value above 0 and at most 1")
        # 1e-9: 0.95 * 20 is 19.000000000000004 in some orders of rounding and must not become 20.
        rank = max(int(np.ceil(sensitivity * len(positives) - 1e-9)), 1)
        threshold = float(positives[rank - 1])
        specificity = float(np.mean(risk[~labels] < threshold))
        reached = rank / len(positives) * independent
        low = float(beta.ppf(0.05, reached, independent - reached + 1))
        point = OperatingPoint(
            sensitivity=sensitivity, threshold=threshold, specificity=specificity, sensitivity_low=low
        )
        points.append(point)
    chosen = next(point for point in points if point.sensitivity == operating)
    return Thresholds(operating_sensitivity=operating, threshold=chosen.threshold, points=points)
