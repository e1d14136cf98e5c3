"""A search's trials as lines over their hyperparameters."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from training.figures import headless_pyplot
from tune.search_ledger import SearchLedger, TrialEntry, outcomes_line, short_names
from tune.search_space import Choice, Distribution, Integer, SearchSpace, Uniform

# An axis of at most so many whole numbers shows each.
MAX_GRID = 8
# Line width, dashes, opacity and legend of a trial, by its state.
_STYLES: dict[str, tuple[float, Any, float, str]] = {
    "finished": (2.4, "-", 1.0, "all folds"),
    "pruned": (1.1, (0, (4, 2)), 0.8, "pruned; scored as if it had all folds"),
    "failed": (1.1, (0, (1, 2)), 0.8, "failed; scored as if it had all folds"),
    "running": (1.1, (0, (6, 2, 1, 2)), 0.8, "not over"),
}


def _number(value: float) -> str:
    """Three significant digits, trailing zeros dropped."""
    return f"{value:.3g}".replace("e-0", "e-")


class _Axis:
    """One vertical axis: where a value lies in [0, 1], and its ticks."""

    def __init__(self, distribution: Distribution):
        self._labels = distribution.labels if isinstance(distribution, Choice) else None
        self.log = not isinstance(distribution, Choice) and distribution.log
        self._grid: list[int] = []
        if isinstance(distribution, Integer):
            self._grid = list(range(distribution.low, distribution.high + 1, distribution.step))
        if self._labels is None:
            self._low, self._high = (self._scale(end) for end in distribution.ends)

    @property
    def num_values(self) -> int:
        """How many values there are where they are few, else 0."""
        count = len(self._labels) if self._labels is not None else len(self._grid)
        return count if count <= MAX_GRID else 0

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else float(value)

    def place(self, value: Any) -> float:
        if self._labels is not None:
            return 0.5 if len(self._labels) == 1 else self._labels.index(value) / (len(self._labels) - 1)
        return (self._scale(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        if self._labels is not None:
            # Of "backbone=a, weights=b" the names of the fields would be the longest part.
            shown = [re.sub(r"(^|, )[\w.]+=", r"\1", str(value)).replace("_", " ") for value in self._labels]
            return [
                (self.place(value), textwrap.fill(text, 18)) for value, text in zip(self._labels, shown, strict=True)
            ]
        if self.num_values:
            return [(self.place(value), str(value)) for value in self._grid]
        if self.log:
            decades = range(math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9) + 1)
            inner = [10.0**decade for decade in decades if 0.1 < (decade - self._low) / (self._high - self._low) < 0.9]
            values = [10**self._low, *inner, 10**self._high]
        else:
            values = list(np.linspace(self._low, self._high, 5))
        return [(self.place(value), _number(value)) for value in values]


def plot_parallel_coordinates(path: Path, ledger: SearchLedger, space: SearchSpace) -> None:
    """Draws each trial with a score as a line over its hyperparameters; the last axis and the colour are its score.

    Pruned trials are thin and dashed, failed ones dotted; their score is what `SearchLedger.adjusted_scores` makes of
    their folds.
    """
    pyplot = headless_pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    adjusted, best = ledger.adjusted_scores(), ledger.best()
    drawn = sorted((e for e in ledger.entries() if e.number in adjusted), key=lambda entry: adjusted[entry.number])
    axes_of = {field: _Axis(distribution) for field, distribution in space.items()}
    names = short_names(list(space))
    last = len(space)
    figure, axes = pyplot.subplots(figsize=(3.2 + 1.75 * (last + 1), 6.2), layout="constrained")
    low, high = (min(adjusted.values()), max(adjusted.values())) if adjusted else (0.0, 0.2)
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    margin = 0.04 * (high - low)
    score_axis = _Axis(Uniform(kind="uniform", low=low - margin, high=high + margin))
    colours, scale = pyplot.get_cmap("viridis"), pyplot.Normalize(low, high)

    spread = _spread(drawn, axes_of)
    for entry in drawn:
        heights = [*spread[entry.number], score_axis.place(adjusted[entry.number])]
        points = [(0.0, heights[0])]
        for x in range(last):
            points += [(x + 0.4, heights[x]), (x + 0.6, heights[x + 1]), (x + 1.0, heights[x + 1])]
        curve = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * (3 * last)])
        width, dashes, opacity, _ = _STYLES[entry.state]
        chosen = best is not None and entry.number == best.number
        if chosen:
            axes.add_patch(PathPatch(curve, fill=False, ec="black", lw=5.0, zorder=3))
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                ec=colours(scale(adjusted[entry.number])),
                lw=width,
                ls=dashes,
                alpha=opacity,
                zorder=3 if chosen else 2,
            )
        )
    for x, (title, axis) in enumerate([*((names[f], a) for f, a in axes_of.items()), ("mean pAUC", score_axis)]):
        axes.plot([x, x], [-0.1, 1.1], color="black", lw=1.0, zorder=4)
        for y, text in axis.ticks():
            axes.plot([x - 0.02, x + 0.02], [y, y], color="black", lw=1.0, zorder=4)
            box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
            axes.text(x - 0.04, y, text, ha="right", va="center", fontsize=9, bbox=box, zorder=5)
        lines = textwrap.wrap(title.replace("_", " "), 16) + ["log"] * axis.log
        axes.text(x, 1.12, "\n".join(lines), ha="center", va="bottom", fontsize=11)
    axes.set(xlim=(-0.75, last + 0.12), ylim=(-0.11, 1.26))
    axes.axis("off")
    shown = {"finished", "pruned"} | {entry.state for entry in drawn}
    handles = [
        Line2D([], [], color="grey", lw=width, ls=dashes, label=text)
        for state, (width, dashes, _, text) in _STYLES.items()
        if state in shown
    ]
    handles.append(Line2D([], [], color="black", lw=5.0, label="best"))
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.08), ncols=len(handles), frameon=False)
    figure.colorbar(pyplot.cm.ScalarMappable(scale, colours), ax=axes, label="mean pAUC", shrink=0.7, pad=0.01)
    figure.suptitle(outcomes_line(ledger))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _spread(drawn: list[TrialEntry], axes_of: dict[str, _Axis]) -> dict[int, list[float]]:
    """Trial number -> its height on each axis; trials of one value of few are set side by side, best on top."""
    heights: dict[int, list[float]] = {entry.number: [] for entry in drawn}
    for field, axis in axes_of.items():
        groups: dict[float, list[int]] = {}
        for entry in drawn:
            groups.setdefault(axis.place(entry.params[field]), []).append(entry.number)
        width = min(0.08, 0.3 / max(1, axis.num_values - 1)) if axis.num_values else 0.0
        for height, numbers in groups.items():
            offsets = np.linspace(-width, width, len(numbers)) if len(numbers) > 1 else [0.0]
            for number, offset in zip(numbers, offsets, strict=True):
                heights[number].append(height + offset)
    return heights
