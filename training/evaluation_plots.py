"""The two pictures people ask for first: ROC with the region the pAUC counts, and calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MIN_TPR = 0.8


def plot_evaluation(
    path: Path, malignant: np.ndarray, risks: dict[str, np.ndarray], title: str, num_bins: int = 10
) -> None:
    """Draws ROC and calibration of each context's risk.

    Args:
        malignant: bool (N,).
        risks: context -> calibrated P(malignant) float (N,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.metrics import roc_curve

    names = {"image_only": "image", "none": "image + metadata", "patient": "image + metadata + patient"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    left.axhspan(MIN_TPR, 1.0, color="#f0c05a", alpha=0.25, lw=0, label="pAUC counts here (sensitivity ≥ 0.8)")
    largest = 0.0
    for context, scores in risks.items():
        label = names.get(context, context)
        false_positive, true_positive, _ = roc_curve(malignant, scores)
        left.plot(false_positive, true_positive, lw=1.8, label=label)
        edges = np.unique(np.quantile(scores, np.linspace(0, 1, num_bins + 1)))
        bins = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, max(len(edges) - 2, 0))
        used = np.unique(bins)
        predicted = np.array([scores[bins == b].mean() for b in used])
        observed = np.array([malignant[bins == b].mean() for b in used])
        right.plot(predicted, observed, "o-", ms=4, lw=1.2, label=label)
        largest = max(largest, float(predicted.max()), float(observed.max()))
    left.plot([0, 1], [0, 1], ":", color="grey", lw=1)
    left.set(xlabel="1 − specificity", ylabel="sensitivity", title="ROC", xlim=(0, 1), ylim=(0, 1.01))
    left.legend(loc="lower right", frameon=False)
    limit = min(1.0, largest * 1.08 + 1e-6)
    right.plot([0, limit], [0, limit], ":", color="grey", lw=1)
    right.set(
        xlabel="predicted risk (equal-count bins)",
        ylabel="observed share malignant",
        title="Calibration",
        xlim=(0, limit),
        ylim=(0, limit),
    )
    right.legend(loc="upper left", frameon=False)
    figure.suptitle(f"{title}: gate split, n = {len(malignant)}, {int(malignant.sum())} malignant")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
