"""The drift of each feature over the stored windows, as small charts of one scale: distance over threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.page_templates import window_name
from serve.plots import Line, Mark, Plot, path

# What is larger is drawn at the edge: that it is above 1 is what counts.
_HIGHEST = 3.0
# Panels that are in sight at once; the others, which are further from their thresholds, are one click away.
SHOWN = 12
_EMBEDDING = "embedding"


@dataclass(frozen=True)
class FeatureView:
    """One feature.

    Attributes:
        ratios: distance over threshold per window, 1 and above is drift; None where it was not judged.
    """

    name: str
    plot: Plot
    ratios: list[float | None]

    @property
    def newest(self) -> float | None:
        return self.ratios[-1]


@dataclass(frozen=True)
class DriftView:
    """All features, those nearest to their thresholds or above first; `windows`: names, oldest first."""

    windows: list[str]
    features: list[FeatureView]

    @property
    def shown(self) -> list[FeatureView]:
        return self.features[:SHOWN]

    @property
    def others(self) -> list[FeatureView]:
        return self.features[SHOWN:]


def drift_view(history: Sequence[dict[str, Any]]) -> DriftView:
    """`history` as `drift_history` has it, oldest first."""
    found: dict[str, list[float | None]] = {}
    for index, row in enumerate(history):
        for name, ratio in _ratios(row).items():
            found.setdefault(name, [None] * len(history))[index] = ratio
    windows = [window_name(row) for row in history]
    # A line does not run through days that nobody checked.
    gaps = [index for index in range(1, len(history)) if _gap(history[index - 1], history[index])]
    views = [
        FeatureView(name, _plot(number, name, ratios, gaps), ratios)
        for number, (name, ratios) in enumerate(found.items())
    ]
    views.sort(key=lambda view: (-(view.newest or 0.0), -max(ratio or 0.0 for ratio in view.ratios), view.name))
    return DriftView(windows, views)


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    ratios = {
        item["name"]: item["distance"] / item["threshold"] for item in row["features"] or [] if item["threshold"] > 0
    }
    embedding = row["embedding"]
    if embedding is not None and embedding["threshold"] > 0.5:
        # An AUC: 0.5 is no difference at all.
        ratios[_EMBEDDING] = max(0.0, (embedding["auc"] - 0.5) / (embedding["threshold"] - 0.5))
    return ratios


def _gap(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return after["window_start"] - before["window_end"] > before["window_end"] - before["window_start"]


def _plot(number: int, name: str, ratios: Sequence[float | None], gaps: Sequence[int]) -> Plot:
    known = [ratio for ratio in ratios if ratio is not None]
    above = sum(ratio >= 1 for ratio in known)
    newest = "not judged in the newest window" if ratios[-1] is None else f"{ratios[-1]:.2f} in the newest window"
    description = f"Distance over threshold: {newest}, at or above 1 in {above} of {len(known)} windows."
    plot = Plot(f"drift-plot-{number}", name, description, 200.0, 80.0, left=6.0, right=194.0, top=8.0, bottom=74.0)
    top = min(_HIGHEST, max([1.4, *known]))
    x, y = plot.x(0, max(1, len(ratios) - 1)), plot.y(0, top)
    plot.lines.append(Line(path([(plot.left, y(1)), (plot.right, y(1))]), "threshold"))
    points: list[tuple[float, float] | None] = []
    for index, ratio in enumerate(ratios):
        if index in gaps:
            points.append(None)
        points.append(None if ratio is None else (x(index), y(ratio)))
    plot.lines.append(Line(path(points), "series"))
    for index, ratio in enumerate(ratios):
        alone = ratio is not None and (index == 0 or index in gaps or ratios[index - 1] is None)
        if ratio is not None and ratio >= 1:
            plot.marks.append(Mark(x(index), y(ratio), "alarm"))
        elif alone or index == len(ratios) - 1 and ratio is not None:
            plot.marks.append(Mark(x(index), y(ratio), "series"))
    return plot
