"""Predictions per hour, and the risks among them beside those of the gate split, as charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from modeling.tested_risks import TestedRisks, log_odds
from serve.plots import Bar, Line, Plot, Tick, count_ticks, nice_ceiling, path, percent_ticks, steps
from serve.times import moment
from store.monitoring_summary import HOUR_US
from store.risk_samples import Risk

# Half a unit of log-odds wide, from 1 in 10,000 to 99 in 100; what lies beyond is in the outermost.
_EDGES = np.linspace(-9.5, 5.0, 30)
_RISK_TICKS = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)
# With fewer a histogram shows chance.
MIN_RISKS = 30


def traffic_plot(summary: Mapping[str, Any]) -> Plot:
    """Stacked bars, an hour each: answered and abstained."""
    hours, start, end = summary["per_hour"], summary["start_us"], summary["end_us"]
    highest = max((entry["predictions"] for entry in hours), default=0)
    description = (
        f"{summary['predictions']:,} predictions in {len(hours)} hours, {summary['abstained']:,} without a risk; "
        f"at most {highest:,} in an hour."
    )
    plot = Plot("traffic-plot", "Predictions per hour", description, x_label="time, UTC")
    top = nice_ceiling(highest)
    x, y = plot.x(start, end), plot.y(0, top)
    plot.x_ticks, plot.y_ticks = _time_ticks(start, end, x), count_ticks(top, y)
    gap = 1.0 if len(hours) <= 24 else 0.2
    for entry in hours:
        left, right = x(entry["start_us"]), x(entry["start_us"] + HOUR_US)
        answered = entry["predictions"] - entry["abstained"]
        for kind, low, high in (("answered", 0, answered), ("abstained", answered, entry["predictions"])):
            if high > low:
                bar = Bar(left, y(high), round(right - left - gap, 2), round(y(low) - y(high), 1), kind)
                plot.bars.append(bar)
    return plot


def _time_ticks(start: int, end: int, x: Any) -> list[Tick]:
    """Whole hours, or midnights of a longer window."""
    hours = (end - start) // HOUR_US
    every = 4 if hours <= 24 else 12 if hours <= 72 else 24
    day = moment(start).replace(hour=0, minute=0, second=0, microsecond=0)
    ticks = []
    for step in range(0, hours + 48, every):
        at = day + timedelta(hours=step)
        microseconds = round(at.timestamp() * 1e6)
        # Not where the text would leave the chart.
        if start + (end - start) * 0.02 <= microseconds <= end - (end - start) * 0.03:
            midnight = f"{at:%a} {at.day}"
            ticks.append(Tick(x(microseconds), midnight if at.hour == 0 else f"{at:%H:%M}"))
    return ticks


@dataclass(frozen=True)
class RiskView:
    """The risks of one context in a window.

    Attributes:
        number: answers that were looked at.
        plot: None with fewer than `MIN_RISKS` of them.
        median: of the window, and reference_median; percent_malignant: of the reference; None without a reference.
    """

    context: str
    number: int
    plot: Plot | None
    rows: list[tuple[str, str, str]]
    median: float
    reference_number: int = 0
    reference_median: float | None = None
    percent_malignant: float | None = None


def risk_views(risks: Sequence[Risk], tested: Mapping[str, TestedRisks]) -> list[RiskView]:
    """One per context, that with most answers first."""
    contexts = Counter(risk.context for risk in risks)
    return [
        _risk_view(name, [risk for risk in risks if risk.context == name], tested.get(name))
        for name, _ in contexts.most_common()
    ]


def _risk_view(context: str, risks: Sequence[Risk], tested: TestedRisks | None) -> RiskView:
    values = np.array([risk.risk for risk in risks])
    median = float(np.median(values))
    known: dict[str, Any] = {}
    if tested is not None and tested.number:
        known = {
            "reference_number": tested.number,
            "reference_median": float(1 / (1 + np.exp(-np.median(tested.logits)))),
            "percent_malignant": 100 * tested.malignant / tested.number,
        }
    if len(values) < MIN_RISKS:
        return RiskView(context, len(values), None, [], median, **known)
    now = _shares(log_odds(values))
    before = _shares(tested.logits) if known and tested is not None else None
    top = nice_ceiling(max(now.max(), 0.0 if before is None else before.max()))
    description = f"{len(values):,} risks with a median of {_percent(median)}"
    if before is not None:
        description += (
            f"; {known['reference_number']:,} of the gate split with a median of {_percent(known['reference_median'])}"
        )
    plot = Plot(
        f"risk-plot-{context}", "How risks are distributed", description + ".", x_label="risk, on a scale of log-odds"
    )
    x, y = plot.x(_EDGES[0], _EDGES[-1]), plot.y(0, top)
    plot.x_ticks = [Tick(x(float(log_odds(np.array(risk)))), f"{100 * risk:g} %") for risk in _RISK_TICKS]
    plot.y_ticks = percent_ticks(top, y)
    for share, left, right in zip(now, _EDGES, _EDGES[1:], strict=False):
        if share > 0:
            plot.bars.append(
                Bar(x(left), y(share), round(x(right) - x(left) - 0.5, 1), round(plot.bottom - y(share), 1), "answered")
            )
    if before is not None:
        plot.lines.append(Line(steps(list(_EDGES), list(before), x, y), "reference"))
    # One threshold per context and model; the newest answer has the one of now.
    at = x(float(log_odds(np.array(risks[0].threshold))))
    plot.lines.append(Line(path([(at, plot.top), (at, plot.bottom)]), "threshold"))
    rows = [
        (
            f"{_percent(_risk(left))} to {_percent(_risk(right))}",
            f"{100 * share:.1f} %",
            "–" if before is None else f"{100 * before[index]:.1f} %",
        )
        for index, (share, left, right) in enumerate(zip(now, _EDGES, _EDGES[1:], strict=False))
        if share > 0 or (before is not None and before[index] > 0)
    ]
    return RiskView(context, len(values), plot, rows, median, **known)


def _shares(logits: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(np.clip(logits, _EDGES[0], _EDGES[-1]), _EDGES)
    return counts / len(logits)


def _risk(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def _percent(risk: float) -> str:
    return f"{100 * risk:.2g} %"
