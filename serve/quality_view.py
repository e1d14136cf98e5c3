"""How good the model is on the lesions that experts have labelled: figures, ROC curve and calibration plot.

Lesions that look dangerous are labelled, others rarely: these figures are of the labelled ones alone. `check_drift`
stores others, corrected for who is labelled; they are shown beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeling.metrics import reliability, roc_auc, roc_curve
from modeling.resampling import MIN_GROUPS
from modeling.tested_risks import wilson_interval
from serve.page_templates import window_name
from serve.plots import Line, Mark, Plot, Tick, path, percent_ticks
from store.risk_samples import LabelledRisk

# Corners of a drawn ROC curve; more are not to be told apart.
_MAX_CORNERS = 150
_PER_BIN, _MAX_BINS = 20, 8
_SQUARE = {"width": 300.0, "height": 300.0, "right": 282.0, "bottom": 256.0, "top": 10.0}
_TICKS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval; None: not known."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        if self.value is None:
            return "–"
        return (
            f"{self.value:.3f}"
            if self.low is None or self.high is None
            else f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"
        )


@dataclass(frozen=True)
class QualityRow:
    """Figures of one source; counts are None where they are not told."""

    source: str
    labelled: int | None
    malignant: int | None
    missed: int | None
    sensitivity: Rate
    specificity: Rate
    auc: Rate


@dataclass(frozen=True)
class QualityView:
    """The quality in one context.

    Attributes:
        labelled, malignant: lesions of which it is known what they were.
        lacking_malignant, lacking_benign: patients with labelled cancers, and with benign lesions, that are still
            needed before anything is shown.
        rows: figures; roc, calibration: charts. Empty and None while labels are lacking.
        bins: the calibration chart as a table: number, mean risk, share of cancers with its interval.
        corners: the ROC curve as a table: sensitivity at shares of false alarms.
        not_corrected: why the last check has no corrected figures.
    """

    context: str
    labelled: int
    malignant: int
    lacking_malignant: int
    lacking_benign: int
    rows: list[QualityRow] = field(default_factory=list)
    roc: Plot | None = None
    calibration: Plot | None = None
    bins: list[tuple[int, float, Rate]] = field(default_factory=list)
    corners: list[tuple[float, float]] = field(default_factory=list)
    not_corrected: str | None = None

    @property
    def enough(self) -> bool:
        return not self.lacking_malignant and not self.lacking_benign


def quality_views(
    labelled: Sequence[LabelledRisk], report: Mapping[str, Any] | None, gate: Mapping[str, Mapping[str, Any]]
) -> list[QualityView]:
    """One per context with labels, that with most first.

    Args:
        report: the newest drift report's row; None: there is none.
        gate: by context, the model's metrics on its gate split.
    """
    contexts = Counter(row.context for row in labelled)
    return [
        _quality_view(name, [row for row in labelled if row.context == name], report, gate.get(name, {}))
        for name, _ in contexts.most_common()
    ]


def _quality_view(
    context: str, rows: Sequence[LabelledRisk], report: Mapping[str, Any] | None, gate: Mapping[str, Any]
) -> QualityView:
    malignant = np.array([row.malignant for row in rows])
    risks = np.array([row.risk for row in rows])
    flagged = risks >= np.array([row.threshold for row in rows])
    groups = np.array([row.group for row in rows])
    patients = [len(np.unique(groups[kind])) for kind in (malignant, ~malignant)]
    counts = (len(rows), int(malignant.sum()))
    lacking = [max(0, MIN_GROUPS - number) for number in patients]
    if any(lacking):
        return QualityView(context, *counts, *lacking)
    sensitivity, specificity = (
        _rate(right[kind], groups[kind]) for kind, right in ((malignant, flagged), (~malignant, ~flagged))
    )
    area = roc_auc(malignant, risks)
    missed = int((malignant & ~flagged).sum())
    now = QualityRow("Labels as of now", *counts, missed, sensitivity, specificity, Rate(area))
    stored, not_corrected = _stored(context, report)
    bins = [
        (number, mean, Rate(share, *wilson_interval(share, number)))
        for number, mean, share in reliability(malignant, risks, min(_MAX_BINS, max(2, len(rows) // _PER_BIN)))
    ]
    false_rates, true_rates = roc_curve(malignant, risks)
    return QualityView(
        context,
        *counts,
        0,
        0,
        rows=[now, *stored, *_of_gate(gate)],
        roc=_roc_plot(context, false_rates, true_rates, area, sensitivity, specificity),
        calibration=_calibration_plot(context, bins),
        bins=bins,
        corners=[
            (share, float(true_rates[np.searchsorted(false_rates, share, "right") - 1]))
            for share in (0.05, 0.1, 0.2, 0.3, 0.5)
        ],
        not_corrected=not_corrected,
    )


def _rate(right: np.ndarray, groups: np.ndarray) -> Rate:
    """Share of right answers with the interval of as many independent lesions as there are patients."""
    share = float(right.mean())
    return Rate(share, *wilson_interval(share, len(np.unique(groups))))


def _stored(context: str, report: Mapping[str, Any] | None) -> tuple[list[QualityRow], str | None]:
    """What the last check measured, plain and corrected, and why not corrected."""
    quality = {} if report is None else report["statistics"].get("quality") or {}
    figures = quality.get("trailing", {}).get("contexts", {}).get(context)
    if report is None or figures is None:
        return [], None
    source = f"Check of {window_name(report)}, {quality['trailing_days']} days"
    rows = [_row(source, figures, figures["n"], figures["n_malignant"], figures["missed"])]
    if figures.get("corrected") is not None:
        rows.append(_row("The same, corrected for who is labelled", figures["corrected"]))
    return rows, figures.get("not_corrected")


def _row(source: str, figures: Mapping[str, Any], *counts: int) -> QualityRow:
    labelled, malignant, missed = counts or (None, None, None)
    rates = (Rate(**(figures.get(name) or {"value": None})) for name in ("sensitivity", "specificity", "auc"))
    return QualityRow(source, labelled, malignant, missed, *rates)


def _of_gate(gate: Mapping[str, Any]) -> list[QualityRow]:
    if not gate:
        return []
    bounds = gate.get("intervals") or {}

    def rate(name: str) -> Rate:
        return Rate(gate.get(name), **(bounds.get(name) or {}))

    area = Rate(**gate["auc"]) if isinstance(gate.get("auc"), Mapping) else Rate(None)
    counts = (gate.get("n"), gate.get("n_malignant"))
    return [
        QualityRow("Gate split, before it was released", *counts, None, rate("sensitivity"), rate("specificity"), area)
    ]


def _roc_plot(
    context: str, false_rates: np.ndarray, true_rates: np.ndarray, area: float, sensitivity: Rate, specificity: Rate
) -> Plot:
    description = (
        f"AUC {area:.3f}. At its threshold the model finds {_percent(sensitivity.value)} of the labelled cancers and "
        f"calls {_percent(1 - (specificity.value or 0.0))} of the labelled benign lesions suspicious."
    )
    plot = Plot(f"roc-plot-{context}", "ROC curve", description, **_SQUARE, x_label="benign lesions called suspicious")
    x, y = plot.x(0, 1), plot.y(0, 1)
    plot.x_ticks, plot.y_ticks = percent_ticks(1.0, x), percent_ticks(1.0, y)
    places = np.unique(np.linspace(0, len(false_rates) - 1, min(_MAX_CORNERS, len(false_rates))).round().astype(int))
    plot.lines.append(Line(path([(x(0), y(0)), (x(1), y(1))]), "diagonal"))
    plot.lines.append(Line(path([(x(float(false_rates[i])), y(float(true_rates[i]))) for i in places]), "series"))
    plot.marks.append(Mark(x(1 - (specificity.value or 0.0)), y(sensitivity.value or 0.0), "point"))
    return plot


def _calibration_plot(context: str, bins: Sequence[tuple[int, float, Rate]]) -> Plot:
    outside = sum(not (rate.low or 0.0) <= mean <= (rate.high or 1.0) for _, mean, rate in bins)
    description = (
        f"{len(bins)} groups of labelled lesions with similar risks: in {outside} of them the mean risk lies outside "
        "the 95 % interval of the share that was cancer."
    )
    plot = Plot(
        f"calibration-plot-{context}", "Calibration", description, **_SQUARE, x_label="mean risk that the model gave"
    )
    x, y = plot.x(0, 1), plot.y(0, 1)
    # Square roots: most risks are below one percent, and a share may be 0.
    plot.x_ticks, plot.y_ticks = ([Tick(axis(share**0.5), f"{100 * share:g} %") for share in _TICKS] for axis in (x, y))
    plot.lines.append(Line(path([(x(0), y(0)), (x(1), y(1))]), "diagonal"))
    for _, mean, rate in bins:
        at, ends = x(mean**0.5), (y((rate.low or 0.0) ** 0.5), y((rate.high or 0.0) ** 0.5))
        plot.lines.append(Line(path([(at, end) for end in ends]), "whisker"))
        plot.marks.append(Mark(at, y((rate.value or 0.0) ** 0.5), "point"))
    return plot


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
