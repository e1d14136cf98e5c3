"""Class-conditional conformal prediction sets: of every class's lesions, at most a chosen share gets a set without it.

Split conformal prediction with one limit per class (Vovk 2012; Sadinle, Lei & Wasserman 2019, "Least ambiguous
set-valued classifiers with bounded error levels"). The promise needs calibration rows and new lesions to be
exchangeable; out-of-fold rows and a refit are not quite, so the coverage reported is measured on the gate split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class ConformalSets(BaseModel):
    """Prediction sets of one model.

    Attributes:
        error: share of a class's lesions whose set may lack it, in expectation.
        limits: per class (K,), the smallest probability with which it belongs to the set; 0 where the class had too few
            rows to leave it out of any set.
        counts: calibration rows per class (K,).
    """

    model_config = ConfigDict(extra="forbid")

    error: float = Field(gt=0, lt=1)
    limits: list[float]
    counts: list[int]

    @classmethod
    def fit(cls, probabilities: np.ndarray, labels: np.ndarray, error: float) -> ConformalSets:
        """Limits from held-out probabilities float (N, K) and class indices int (N,)."""
        limits, counts = [], []
        for column in range(probabilities.shape[1]):
            own = np.sort(probabilities[labels == column, column])
            # The rank'th smallest: below it lie at most `error` of the rows and of one more to come. 1e-9: 0.1 * 30 is
            # 3.0000000000000004 in binary, and 0.3 * 10 is 3.0 less an ulp.
            rank = int(np.floor(error * (len(own) + 1) + 1e-9))
            limits.append(float(own[rank - 1]) if rank > 0 else 0.0)
            counts.append(len(own))
        return cls(error=error, limits=limits, counts=counts)

    def sets(self, probabilities: np.ndarray) -> np.ndarray:
        """bool (N, K): which classes belong to each lesion's set; it may hold several, or none."""
        return np.asarray(probabilities, dtype=np.float64) >= np.array(self.limits)

    def coverage(self, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
        """What the sets do on held-out rows, JSON-ready: target coverage, measured coverage by class (None where a
        class has no row), mean set size, and the shares of sets that hold one class or none."""
        sets = self.sets(probabilities)
        hit = sets[np.arange(len(labels)), labels]
        sizes = sets.sum(axis=1)
        by_class = {}
        for column, name in enumerate(classes):
            own = labels == column
            by_class[name] = float(hit[own].mean()) if own.any() else None
        return {
            "target": 1 - self.error,
            "coverage": by_class,
            "mean_size": float(sizes.mean()) if len(sizes) else None,
            "single": float((sizes == 1).mean()) if len(sizes) else None,
            "empty": float((sizes == 0).mean()) if len(sizes) else None,
        }
