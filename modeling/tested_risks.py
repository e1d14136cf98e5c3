"""How often lesions with a risk like this one were malignant: what a risk is worth, in counted lesions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# So many of the gate split's lesions, those with the closest risks, stand for a risk.
NUM_NEAREST = 100
_Z = 1.959963984540054
_TINY = 1e-9


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """95 % interval of a share of `number` independent pictures (Wilson 1927); it holds for a share of 0 as well, where
    a bootstrap gives (0, 0)."""
    centre = share + _Z**2 / (2 * number)
    width = _Z * (share * (1 - share) / number + _Z**2 / (4 * number**2)) ** 0.5
    scale = 1 + _Z**2 / number
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


@dataclass(frozen=True)
class SimilarRisks:
    """The tested lesions with the closest risks.

    Attributes:
        number: how many.
        malignant: so many of them were.
        low, high: 95 % interval of the share that is, as if they were independent.
    """

    number: int
    malignant: int
    low: float
    high: float


class TestedRisks:
    """A context's risks on the gate split, and what those lesions were.

    Args:
        risks: float (N,), 0-1.
        malignant: bool (N,).
    """

    # Not a test of pytest's.
    __test__ = False

    def __init__(self, risks: np.ndarray, malignant: np.ndarray):
        known = np.isfinite(risks)
        order = np.argsort(risks[known], kind="stable")
        self._logits = log_odds(risks[known][order])
        self._malignant = np.asarray(malignant, bool)[known][order]

    @property
    def number(self) -> int:
        """Lesions with a risk."""
        return len(self._logits)

    @property
    def malignant(self) -> int:
        """Those of them that were malignant."""
        return int(self._malignant.sum())

    @property
    def logits(self) -> np.ndarray:
        """Their risks as log-odds, float64 (number,), ascending."""
        return self._logits

    def similar(self, risk: float, number: int = NUM_NEAREST) -> SimilarRisks | None:
        """Those next to `risk` in log-odds: `number`, and all that are as far away as the last of them; None with fewer
        lesions altogether."""
        if len(self._logits) < number:
            return None
        distance = np.abs(self._logits - log_odds(np.array(risk)))
        nearest = distance <= np.partition(distance, number - 1)[number - 1]
        number, malignant = int(nearest.sum()), int(self._malignant[nearest].sum())
        return SimilarRisks(number, malignant, *wilson_interval(malignant / number, number))


def log_odds(risks: np.ndarray) -> np.ndarray:
    """Log-odds of risks 0-1, float64 of their shape, finite also for 0 and 1."""
    clipped = np.clip(np.asarray(risks, np.float64), _TINY, 1 - _TINY)
    return np.log(clipped) - np.log1p(-clipped)
