"""Detection metrics: partial AUC above a sensitivity, calibration error, and the report of one model on one split.

A metric whose class is absent is NaN (None in the report), never an exception and never a made-up number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modeling.resampling import clustered_bootstrap
from modeling.schema import TaskSpec

_PROBABILITY_FLOOR = 1e-7


def _binary_inputs(labels: Sequence, scores: Sequence) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be vectors of the same length")
    if np.isnan(scores).any():
        raise ValueError(f"scores hold {int(np.isnan(scores).sum())} NaN of {len(scores)} values")
    return labels.astype(bool), scores


def _area_above(positives: np.ndarray, negatives: np.ndarray, min_tpr: float) -> float:
    """Area between the ROC curve and the line TPR = min_tpr, from the counts (U,) at each distinct score, ascending."""
    if positives.sum() == 0 or negatives.sum() == 0:
        return float("nan")
    tpr, fpr = _cumulative(positives), _cumulative(negatives)
    first = max(int(np.searchsorted(tpr, min_tpr)), 1)  # the segment that ends here crosses the line
    share = (min_tpr - tpr[first - 1]) / (tpr[first] - tpr[first - 1]) if min_tpr > 0 else 0.0
    crossing = fpr[first - 1] + share * (fpr[first] - fpr[first - 1])
    heights = np.concatenate([[min_tpr], tpr[first:]]) - min_tpr
    return float(np.trapezoid(heights, np.concatenate([[crossing], fpr[first:]])))


def _cumulative(counts: np.ndarray) -> np.ndarray:
    """Shares (U + 1,) at or above each distinct score, from the highest down, 0 to 1; counts (U,) ascending."""
    shares = np.concatenate([[0.0], np.cumsum(counts[::-1]) / counts.sum()])
    shares[-1] = 1.0
    return shares


def _counts(
    labels: np.ndarray, ranks: np.ndarray, num_ranks: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    sides = [(ranks[rows], None if weights is None else weights[rows]) for rows in (labels, ~labels)]
    positives, negatives = (np.bincount(own, weight, num_ranks) for own, weight in sides)
    return positives, negatives


def partial_auc_above_tpr(labels: Sequence, scores: Sequence, min_tpr: float = 0.8) -> float:
    """The ISIC 2024 metric: the area under the ROC curve above `min_tpr`, `∫ max(TPR(f) - min_tpr, 0) df`.

    Equals scikit-learn's standardised `m = roc_auc_score(1 - labels, -scores, max_fpr=r)` with `r = 1 - min_tpr`,
    turned back into an area: `r²/2 + (r - r²/2) * (2m - 1)`, that is `0.02 + 0.18 * (2m - 1)` at 80 %.

    Args:
        labels: 0/1 or bool (N,), 1 = malignant.
        scores: float (N,), higher = more suspicious; ties count half, as in any trapezoidal ROC.
        min_tpr: sensitivity from which area counts, in [0, 1).

    Returns:
        Area in [0, 1 - min_tpr]; NaN when a class is absent.
    """
    if not 0 <= min_tpr < 1:
        raise ValueError(f"min_tpr is {min_tpr}; expected a value in [0, 1)")
    labels, scores = _binary_inputs(labels, scores)
    values, ranks = np.unique(scores, return_inverse=True)
    return _area_above(*_counts(labels, ranks, len(values)), min_tpr)


def roc_auc(labels: Sequence, scores: Sequence) -> float:
    """Area under the ROC curve of 0/1 labels (N,) and scores (N,); NaN when a class is absent."""
    return partial_auc_above_tpr(labels, scores, min_tpr=0.0)


def roc_curve(labels: Sequence, scores: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the ROC curve, from (0, 0) to (1, 1): false and true positive rates, float64 (U + 1,) each for U
    distinct scores.

    Args:
        labels: 0/1 or bool (N,), 1 = malignant; scores: float (N,), higher = more suspicious.

    Raises:
        ValueError: a class is absent.
    """
    labels, scores = _binary_inputs(labels, scores)
    if labels.all() or not labels.any():
        raise ValueError(f"{int(labels.sum())} of {len(labels)} labels are malignant; expected some of each")
    values, ranks = np.unique(scores, return_inverse=True)
    positives, negatives = _counts(labels, ranks, len(values))
    return _cumulative(negatives), _cumulative(positives)


def resampled_areas(
    labels: Sequence, scores: Sequence, weights: np.ndarray | None = None
) -> Callable[[np.ndarray], tuple[float, float]]:
    """AUC and pAUC above 80 % sensitivity of resamples: a function of row indices (M,), with repeats.

    Ranks are computed once: each resample then needs counts, no sort (5 ms instead of 60 at 400k rows).

    Args:
        weights: how many rows each stands for, float (N,) above 0; None = itself.
    """
    labels, scores = _binary_inputs(labels, scores)
    values, ranks = np.unique(scores, return_inverse=True)

    def areas(rows: np.ndarray) -> tuple[float, float]:
        counts = _counts(labels[rows], ranks[rows], len(values), None if weights is None else weights[rows])
        return _area_above(*counts, 0.0), _area_above(*counts, 0.8)

    return areas


def _recalls(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """float (num_classes,): recall of each class, NaN for classes without rows."""
    totals = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[labels == predicted], minlength=num_classes)
    return np.divide(hits, totals, out=np.full(len(totals), np.nan), where=totals > 0)


def balanced_accuracy(labels: Sequence, predicted: Sequence) -> float:
    """Mean recall over the classes that occur in `labels`; both int (N,). NaN for no rows."""
    labels, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if len(labels) == 0:
        return float("nan")
    return float(np.nanmean(_recalls(labels, predicted, int(labels.max()) + 1)))


def macro_f1(labels: Sequence, predicted: Sequence) -> float:
    """Mean F1 over the classes that occur in `labels` or `predicted`, both int (N,). NaN for no rows."""
    labels, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if len(labels) == 0:
        return float("nan")
    size = int(max(labels.max(), predicted.max())) + 1
    hits = np.bincount(labels[labels == predicted], minlength=size)
    occurrences = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
    present = occurrences > 0
    return float(np.mean(2 * hits[present] / occurrences[present]))


def sensitivity_specificity(labels: Sequence, scores: Sequence, threshold: float) -> tuple[float, float]:
    """Sensitivity and specificity when `score >= threshold` means malignant; NaN for the side whose class is absent."""
    labels, scores = _binary_inputs(labels, scores)
    flagged = scores >= threshold
    sensitivity = float(flagged[labels].mean()) if labels.any() else float("nan")
    specificity = float((~flagged[~labels]).mean()) if not labels.all() else float("nan")
    return sensitivity, specificity


def adaptive_ece(labels: Sequence, probabilities: Sequence, num_bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: mean of |observed rate - mean probability|, by bin size.

    Equal-width bins would put nearly every lesion of a rare-cancer set into the first bin. Equal probabilities always
    share a bin. Returns a value in [0, 1]; NaN for no rows.
    """
    labels, probabilities = _binary_inputs(labels, probabilities)
    if len(labels) == 0:
        return float("nan")
    bins = _equal_mass_bins(probabilities, num_bins)
    gaps = np.bincount(bins, weights=labels - probabilities, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def _equal_mass_bins(probabilities: np.ndarray, num_bins: int) -> np.ndarray:
    edges = np.quantile(probabilities, np.linspace(0, 1, num_bins + 1)[1:-1])
    return np.searchsorted(edges, probabilities, side="left")


def reliability(labels: Sequence, probabilities: Sequence, num_bins: int) -> list[tuple[int, float, float]]:
    """Number of rows, mean probability and observed rate of each bin of equal mass (as `adaptive_ece` has them), by
    probability; bins without a row are left out."""
    labels, probabilities = _binary_inputs(labels, probabilities)
    if len(labels) == 0:
        return []
    bins = _equal_mass_bins(probabilities, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=values, minlength=num_bins) for values in (probabilities, labels)]
    return [
        (int(counts[i]), float(sums[0][i] / counts[i]), float(sums[1][i] / counts[i])) for i in np.flatnonzero(counts)
    ]


def calibration_slope_intercept(labels: Sequence, probabilities: Sequence) -> tuple[float, float]:
    """How logits of the probabilities (N,) must be stretched and shifted to fit the 0/1 labels (N,); ideal (1, 0).

    The slope comes from logistic regression on the logit (below 1: overconfident); the intercept is
    calibration-in-the-large, the shift with the slope held at 1 (above 0: risks too low). NaN where undefined: a class
    absent, constant probabilities or, for the slope, perfectly separated classes.
    """
    labels, probabilities = _binary_inputs(labels, probabilities)
    if labels.all() or not labels.any():
        return float("nan"), float("nan")
    clipped = np.clip(probabilities, _PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    logits = np.log(clipped / (1 - clipped))
    intercept = float(_logistic_newton(np.ones((len(labels), 1)), labels, offset=logits)[0])
    separated = logits[labels].min() >= logits[~labels].max()
    if separated or np.ptp(logits) < 1e-9:
        return float("nan"), intercept
    design = np.stack([logits, np.ones_like(logits)], axis=1)
    return float(_logistic_newton(design, labels, offset=np.zeros_like(logits))[0]), intercept


def _logistic_newton(design: np.ndarray, labels: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Coefficients (P,) of an unpenalised logistic regression, by Newton steps halved until the loss falls."""

    def loss(coefficients: np.ndarray) -> float:
        margins = design @ coefficients + offset
        return float(np.sum(np.logaddexp(0, margins) - labels * margins))

    coefficients = np.zeros(design.shape[1])
    current = loss(coefficients)
    for _ in range(100):
        rates = 0.5 * (1 + np.tanh((design @ coefficients + offset) / 2))
        weights = np.maximum(rates * (1 - rates), 1e-12)
        step = np.linalg.lstsq(design.T @ (design * weights[:, None]), design.T @ (labels - rates), rcond=None)[0]
        scale = 1.0
        while scale > 1e-6 and loss(coefficients + scale * step) > current:
            scale /= 2
        coefficients = coefficients + scale * step
        previous, current = current, loss(coefficients)
        if previous - current < 1e-10 * max(1.0, previous):
            break
    return coefficients


def risk(probabilities: np.ndarray, task: TaskSpec) -> np.ndarray:
    """P(malignant) (N,): the sum of the malignant columns of class probabilities (N, K)."""
    return np.asarray(probabilities, dtype=np.float64)[:, task.malignant_mask].sum(axis=1)


def predicted_classes(probabilities: np.ndarray, task: TaskSpec, threshold: float | None) -> np.ndarray:
    """Class indices int64 (N,): the most probable class, but for two classes the one that the operating threshold on
    the risk decides, because the most probable class of a rare cancer is always benign."""
    if task.num_classes == 2 and threshold is not None:
        positive = int(np.flatnonzero(task.malignant_mask)[0])
        return np.where(risk(probabilities, task) >= threshold, positive, 1 - positive)
    return np.asarray(probabilities).argmax(axis=1)


# The first _NUM_WHOLE are {value, low, high} in a report; the bounds of the others stand under "intervals".
_RESAMPLED = (
    *("auc", "pauc", "balanced_accuracy", "balanced_accuracy_equal_priors"),
    *("accuracy", "sensitivity", "specificity"),
)
_NUM_WHOLE = 4


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def evaluate(
    task: TaskSpec,
    labels: Sequence,
    probabilities: np.ndarray,
    groups: Sequence | None,
    threshold: float | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The evaluation report of one model on one split, JSON-ready (undefined values are None).

    Args:
        task: classes and which of them are malignant.
        labels: class indices int (N,).
        probabilities: calibrated class probabilities (N, K).
        groups: group ids (N,) for the bootstrap; None = every row on its own.
        threshold: operating point on the risk, which also decides between two classes (`predicted_classes`).
        num_bootstrap: resamples; 0 leaves the intervals None.
        seed: of the resampling.

    Returns:
        n, n_malignant; auc, pauc (above 80 % sensitivity), balanced_accuracy and balanced_accuracy_equal_priors as
        {value, low, high}; accuracy, macro_f1, sensitivity, specificity, ece, calibration_slope,
        calibration_intercept; intervals {accuracy, sensitivity, specificity: {low, high}}; recalls {class: recall}.
        Under equal priors the predicted class is the one that stands out most against its mean probability: what a
        model gets that was never calibrated to class frequencies. Bounds are None where `clustered_bootstrap` has none.
    """
    labels, probabilities = np.asarray(labels, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    if probabilities.shape != (len(labels), task.num_classes):
        raise ValueError(
            f"probabilities have shape {probabilities.shape}; expected ({len(labels)}, {task.num_classes})"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < task.num_classes:
        raise ValueError(f"labels range from {labels.min()} to {labels.max()}; expected 0 to {task.num_classes - 1}")
    risks, malignant = risk(probabilities, task), task.malignant_mask[labels]
    _binary_inputs(malignant, risks)
    predicted = predicted_classes(probabilities, task, threshold)
    areas = resampled_areas(malignant, risks)
    # The mean probability stands in for the class frequency, so no label is looked at.
    frequencies = np.maximum(probabilities.mean(axis=0), _PROBABILITY_FLOOR) if len(labels) else 1.0
    relative = (probabilities / frequencies).argmax(axis=1)

    def statistics(rows: np.ndarray) -> np.ndarray:
        accuracies = [balanced_accuracy(labels[rows], classes[rows]) for classes in (predicted, relative)]
        rates = (float("nan"), float("nan"))
        if threshold is not None:
            rates = sensitivity_specificity(malignant[rows], risks[rows], threshold)
        accuracy = np.mean(labels[rows] == predicted[rows]) if len(rows) else float("nan")
        return np.array([*areas(rows), *accuracies, accuracy, *rates])

    point = statistics(np.arange(len(labels)))
    clusters = np.arange(len(labels)) if groups is None else groups
    low, high = clustered_bootstrap(statistics, clusters, num_bootstrap, seed, malignant)
    slope, intercept = calibration_slope_intercept(malignant, risks)
    report: dict[str, Any] = {"n": len(labels), "n_malignant": int(malignant.sum()), "intervals": {}}
    for index, name in enumerate(_RESAMPLED):
        bounds = {"low": _number(low[index]), "high": _number(high[index])}
        if index < _NUM_WHOLE:
            report[name] = {"value": _number(point[index]), **bounds}
        else:
            report[name], report["intervals"][name] = _number(point[index]), bounds
    return report | {
        "macro_f1": _number(macro_f1(labels, predicted)),
        "ece": _number(adaptive_ece(malignant, risks)),
        "calibration_slope": _number(slope),
        "calibration_intercept": _number(intercept),
        "recalls": dict(zip(task.classes, map(_number, _recalls(labels, predicted, task.num_classes)), strict=True)),
    }
