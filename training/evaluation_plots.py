"""The pictures people ask for: ROC with the region the pAUC counts, calibration, precision-recall, decision curve,
confusion matrix and subgroups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.figures import headless_pyplot

MIN_TPR = 0.8
MAX_SUBGROUPS, MAX_LABEL = 36, 40


def _names(has_image: bool) -> dict[str, str]:
    metadata = "image + metadata" if has_image else "metadata"
    return {"image_only": "image", "none": metadata, "patient": f"{metadata} + patient"}


def _undefined_curve(malignant: np.ndarray) -> str | None:
    """Why there is no curve, where one class is absent: any line drawn then would be made up."""
    if malignant.any() and not malignant.all():
        return None
    return f"not measurable: no {'benign' if malignant.any() else 'malignant'} lesion"


def plot_evaluation(
    path: Path, malignant: np.ndarray, risks: dict[str, np.ndarray], title: str, has_image: bool, num_bins: int = 10
) -> None:
    """Draws ROC and calibration of each context's risk.

    Args:
        malignant: bool (N,).
        has_image: whether the model sees pictures, for the legend.
        risks: context -> calibrated P(malignant) float (N,).
    """
    pyplot = headless_pyplot()
    from sklearn.metrics import roc_curve

    names = _names(has_image)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    left.axhspan(MIN_TPR, 1.0, color="#f0c05a", alpha=0.25, lw=0, label="pAUC counts here (sensitivity ≥ 0.8)")
    largest, undefined = 0.0, _undefined_curve(malignant)
    if undefined:
        left.text(0.5, 0.5, undefined, ha="center")
    for context, scores in risks.items():
        label = names.get(context, context)
        if not undefined:
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


def plot_clinical(
    path: Path,
    malignant: np.ndarray,
    risks: dict[str, np.ndarray],
    clinical: dict[str, dict[str, Any]],
    classes: list[str],
    title: str,
    has_image: bool,
) -> None:
    """Draws precision-recall and decision curves of each context, confusion matrix and subgroups of the last one.

    Args:
        malignant: bool (N,).
        risks: context -> calibrated P(malignant) float (N,).
        clinical: context -> report of `training.clinical_report`.
    """
    pyplot = headless_pyplot()
    from sklearn.metrics import precision_recall_curve

    names, last = _names(has_image), list(clinical)[-1]
    figure, axes = pyplot.subplot_mosaic(
        [["curve", "confusion", "subgroups"], ["decision", "confusion", "subgroups"]],
        figsize=(17, 9),
        width_ratios=[1.1, 1, 0.9],
        layout="constrained",
    )
    curve, decision, confusion, subgroups = (axes[name] for name in ("curve", "decision", "confusion", "subgroups"))
    undefined = _undefined_curve(malignant)
    if undefined:
        curve.text(0.5, 0.5, undefined, ha="center")
    for context, scores in risks.items():
        if not undefined:
            precision, recall, _ = precision_recall_curve(malignant, scores)
            curve.plot(recall, precision, lw=1.6, label=names.get(context, context))
        rows = clinical[context]["net_benefit"]
        thresholds = [row["threshold"] for row in rows]
        decision.plot(thresholds, [row["model"] for row in rows], "o-", ms=4, lw=1.6, label=names.get(context, context))
    curve.axhline(malignant.mean(), ls=":", color="grey", lw=1, label="prevalence")
    curve.set(xlabel="sensitivity (recall)", ylabel="precision", title="Precision-recall", xlim=(0, 1), ylim=(0, 1.02))
    curve.legend(frameon=False)
    decision.plot(thresholds, [row["treat_all"] for row in rows], ":", color="grey", label="treat all")
    decision.axhline(0, color="black", lw=0.8, label="treat none")
    decision.set(
        xscale="log", xlabel="risk from which one would act", ylabel="net benefit per lesion", title="Decision curve"
    )
    highest = max((row["model"] for context in risks for row in clinical[context]["net_benefit"]), default=0.0)
    if highest > 0:
        # Treating all falls far below treating none at high thresholds; by how much is nobody's question.
        decision.set_ylim(-0.3 * highest, 1.1 * highest)
    decision.legend(frameon=False)
    _confusion(confusion, np.array(clinical[last]["confusion"]), classes, names.get(last, last))
    _subgroups(subgroups, clinical[last]["subgroups"], names.get(last, last))
    figure.suptitle(f"{title}: gate split, n = {len(malignant)}, {int(malignant.sum())} malignant")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _confusion(axes: Any, counts: np.ndarray, classes: list[str], name: str) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Confusion matrix\n{name}; shade: share of row")


def _subgroups(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    """Sensitivity and specificity at the operating threshold; a subgroup with few cancers shows no sensitivity."""
    from matplotlib.lines import Line2D

    rows = rows[:MAX_SUBGROUPS]
    colours = {"sensitivity": "#b5473c", "specificity": "#3c6eb5"}
    for position, row in enumerate(rows):
        for measure, colour in colours.items():
            if row[measure] is not None:
                axes.plot(row[measure], position, "o", color=colour, ms=5)
    names = [f"{row['column']}: {row['value']}" for row in rows]
    # Institutions' names would leave no room for the points.
    names = [f"{text[: MAX_LABEL - 1]}…" if len(text) > MAX_LABEL else text for text in names]
    labels = [f"{text} ({row['n_malignant']}/{row['n']})" for text, row in zip(names, rows, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlim=(0, 1.03), title=f"Subgroups at the operating threshold\n{name} (malignant/all)")
    handles = [Line2D([], [], marker="o", ls="", color=colour, label=measure) for measure, colour in colours.items()]
    # Below the axis: a point may lie anywhere inside.
    axes.legend(handles=handles, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=2)
