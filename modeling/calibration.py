"""From scores to probabilities: prior correction, class scaling, risk calibration.

Class-balanced training breaks probabilities. They are repaired in this order: `ClassScaling` fits the classes'
log-probabilities to the labels (it starts from the prior correction), a calibrator fits the risk, and
`prior_correction` moves the result to another population where one is configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

# sigmoid(16) rounds to 1 - 1e-7: beyond it a probability carries no information, only the risk of an infinite loss.
_LOGIT_LIMIT = 16.0
# Calibration never turns a ranking around: an uninformative score gets a flat risk, not an inverted one.
_MIN_SLOPE = 1e-3


def logit(probabilities: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), limited to ±16."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probabilities) - np.log1p(-probabilities), -_LOGIT_LIMIT, _LOGIT_LIMIT)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Normalised log-probabilities float64 (N, K) of logits (N, K)."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def prior_correction(
    probabilities: np.ndarray, sampling_prior: Sequence[float], population_prior: Sequence[float]
) -> np.ndarray:
    """Probabilities under the population's class frequencies, from those under the training sample's.

    `p_c * population_c / sampling_c`, renormalised; for two classes that is `βp / (βp + 1 - p)` with β the ratio of
    the prior odds.

    Args:
        probabilities: float (N, K).
        sampling_prior: class frequencies (K,) in the sample the model saw.
        population_prior: class frequencies (K,) where the model is used.

    Raises:
        ValueError: a prior of the wrong length, negative, or zero in the sample only.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    sampling, population = np.asarray(sampling_prior, dtype=np.float64), np.asarray(population_prior, dtype=np.float64)
    for name, prior in (("sampling_prior", sampling), ("population_prior", population)):
        if prior.shape != probabilities.shape[1:] or not np.isfinite(prior).all() or (prior < 0).any():
            raise ValueError(f"{name} is {prior.tolist()}; expected {probabilities.shape[1]} non-negative frequencies")
    unseen = np.flatnonzero((sampling == 0) & (population > 0))
    if len(unseen):
        raise ValueError(
            f"sampling_prior of class {unseen[0]} is 0 but its population_prior is {population[unseen[0]]}"
        )
    ratio = np.divide(population, sampling, out=np.zeros_like(population), where=sampling > 0)
    weighted = probabilities * ratio
    totals = weighted.sum(axis=1, keepdims=True)
    # All mass on classes that the population lacks: nothing is known but the population itself.
    return np.where(totals > 0, weighted / np.where(totals > 0, totals, 1.0), population / population.sum())


def apply_to_classes(probabilities: np.ndarray, malignant_mask: np.ndarray, calibrated_risk: np.ndarray) -> np.ndarray:
    """Class probabilities (N, K) rescaled within malignant and within benign so that the malignant sum to the risk."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    result = np.empty_like(probabilities)
    for mask, total in ((malignant_mask, calibrated_risk), (~malignant_mask, 1.0 - np.asarray(calibrated_risk))):
        part = probabilities[:, mask]
        sums = part.sum(axis=1, keepdims=True)
        shares = np.where(sums > 0, part / np.where(sums > 0, sums, 1.0), 1.0 / mask.sum())
        result[:, mask] = shares * np.asarray(total)[:, None]
    return result


class ClassScaling(BaseModel):
    """Multinomial calibration of log-probabilities: `log_softmax(slope * log p + bias)`, one slope, one bias per class.

    Fitted by penalised maximum likelihood around slope 1 and the prior correction, with a weight of one row, so that a
    class of a few rows keeps nearly the prior correction and thousands of rows decide for themselves.
    """

    model_config = ConfigDict(extra="forbid")

    slope: float
    bias: list[float]

    @classmethod
    def fit(
        cls, log_probabilities: np.ndarray, labels: np.ndarray, sampling_prior: np.ndarray, row_prior: np.ndarray
    ) -> ClassScaling:
        """Fits to log-probabilities (N, K) and class indices (N,); priors (K,) of the training sample and the rows."""
        from scipy.optimize import minimize

        scores = np.asarray(log_probabilities, dtype=np.float64)
        target = np.eye(scores.shape[1])[labels]
        sampling, rows = np.asarray(sampling_prior, dtype=np.float64), np.asarray(row_prior, dtype=np.float64)
        known = (sampling > 0) & (rows > 0)
        prior_shift = np.where(known, np.log(np.where(known, rows, 1.0) / np.where(known, sampling, 1.0)), 0.0)

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            predicted = log_softmax(parameters[0] * scores + parameters[1:])
            error = np.exp(predicted) - target
            pull = parameters - np.concatenate([[1.0], prior_shift])
            gradient = np.concatenate([[np.sum(error * scores)], error.sum(axis=0)]) + pull
            return float(-np.sum(predicted * target) + 0.5 * pull @ pull), gradient

        start = np.concatenate([[1.0], prior_shift])
        bounds = [(_MIN_SLOPE, None)] + [(None, None)] * scores.shape[1]
        fitted = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
        return cls(slope=float(fitted[0]), bias=fitted[1:].tolist())

    def transform(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Calibrated log-probabilities float64 (N, K)."""
        return log_softmax(self.slope * np.asarray(log_probabilities, dtype=np.float64) + np.array(self.bias))


class Calibrator(Protocol):
    """Monotone map of P(malignant) (N,) to calibrated P(malignant) (N,)."""

    def transform(self, probabilities: np.ndarray) -> np.ndarray: ...

    def to_json(self) -> dict[str, Any]: ...


class PlattCalibrator:
    """Logistic calibration on the logit: `sigmoid(slope * logit(p) + intercept)`, slope > 0.

    Platt's smoothed targets keep it finite for separable scores and for a handful of positives.
    """

    def __init__(self, slope: float = 1.0, intercept: float = 0.0):
        self.slope, self.intercept = float(slope), float(intercept)

    @classmethod
    def fit(cls, probabilities: np.ndarray, labels: np.ndarray) -> PlattCalibrator:
        """Fits to probabilities (N,) and 0/1 labels (N,). Constant probabilities get only a shift."""
        from scipy.optimize import minimize

        scores, labels = logit(probabilities), np.asarray(labels).astype(bool)
        if len(labels) == 0:
            return cls()
        targets = np.where(labels, (labels.sum() + 1) / (labels.sum() + 2), 1 / ((~labels).sum() + 2))
        slope_known = np.ptp(scores) < 1e-9 or labels.all() or not labels.any()

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            margins = parameters[0] * scores + parameters[1]
            error = sigmoid(margins) - targets
            gradient = np.array([np.mean(error * scores), np.mean(error)])
            return float(np.mean(np.logaddexp(0, margins) - targets * margins)), gradient

        bounds = [(1.0, 1.0) if slope_known else (_MIN_SLOPE, None), (None, None)]
        options = {"ftol": 1e-14, "gtol": 1e-9}
        return cls(*minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds, options=options).x)

    def transform(self, probabilities: np.ndarray) -> np.ndarray:
        return sigmoid(self.slope * logit(probabilities) + self.intercept)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "platt", "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PlattCalibrator:
        return cls(data["slope"], data["intercept"])


class IsotonicCalibrator:
    """Isotonic regression, linear between the centres of its blocks.

    Plain isotonic steps tie most lesions, which costs partial AUC and makes ranking a patient's lesions arbitrary; the
    interpolation keeps order inside the range, and a millionth part of the raw probability keeps it at both ends.
    """

    _RAW_SHARE = 1e-6

    def __init__(self, inputs: Sequence[float], outputs: Sequence[float]):
        self.inputs, self.outputs = np.asarray(inputs, dtype=np.float64), np.asarray(outputs, dtype=np.float64)

    @classmethod
    def fit(cls, probabilities: np.ndarray, labels: np.ndarray) -> IsotonicCalibrator:
        """Fits to probabilities (N,) and 0/1 labels (N,)."""
        from scipy.optimize import isotonic_regression

        probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels).astype(np.float64)
        if len(labels) == 0:
            return cls([0.0, 1.0], [0.0, 1.0])
        values, ranks, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
        rates = np.bincount(ranks, weights=labels) / counts
        blocks = isotonic_regression(rates, weights=counts).blocks
        sizes = np.add.reduceat(counts, blocks[:-1])
        centres = np.add.reduceat(values * counts, blocks[:-1]) / sizes
        positives = np.add.reduceat(rates * counts, blocks[:-1])
        # An observed rate of 0 or 1 is not certainty: the rule of succession's bound for that many lesions.
        outputs = np.clip(positives / sizes, 1 / (len(labels) + 2), 1 - 1 / (len(labels) + 2))
        return cls(centres, outputs)

    def transform(self, probabilities: np.ndarray) -> np.ndarray:
        probabilities = np.asarray(probabilities, dtype=np.float64)
        fitted = np.interp(probabilities, self.inputs, self.outputs)
        return (1 - self._RAW_SHARE) * fitted + self._RAW_SHARE * probabilities

    def to_json(self) -> dict[str, Any]:
        return {"kind": "isotonic", "inputs": self.inputs.tolist(), "outputs": self.outputs.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> IsotonicCalibrator:
        return cls(data["inputs"], data["outputs"])


CALIBRATORS: dict[str, type[PlattCalibrator] | type[IsotonicCalibrator]] = {
    "platt": PlattCalibrator,
    "isotonic": IsotonicCalibrator,
}


def calibrator_from_json(data: dict[str, Any]) -> Calibrator:
    """The calibrator that `to_json` described.

    Raises:
        ValueError: unknown kind.
    """
    if data.get("kind") not in CALIBRATORS:
        raise ValueError(f"calibration kind is {data.get('kind')!r}; expected one of {sorted(CALIBRATORS)}")
    return CALIBRATORS[data["kind"]].from_json(data)
