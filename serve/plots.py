"""Geometry of the pages' charts: data to coordinates of an SVG, whose look is the style sheet's.

A chart is drawn by the macro `plot` of `_plots.html`. Its units are those of the view box; on a page it is as wide as
its column, so that text of 12 units is some 10 to 16 pixels high.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 400.0, 200.0


@dataclass(frozen=True)
class Scale:
    """Maps `low` to `start` and `high` to `end`, linearly; values beyond are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = 0.0 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A rectangle; `kind` is its class in the style sheet, as of the other shapes."""

    x: float
    y: float
    width: float
    height: float
    kind: str


@dataclass(frozen=True)
class Line:
    """A path as SVG writes it."""

    path: str
    kind: str


@dataclass(frozen=True)
class Mark:
    """A point: a triangle where `kind` is "alarm", else a dot."""

    x: float
    y: float
    kind: str


@dataclass
class Plot:
    """A chart.

    Attributes:
        name: its id on the page.
        title: what it shows, in a few words; description: what is to be seen, for whoever does not see it.
        left, right, top, bottom: the box of the data.
    """

    name: str
    title: str
    description: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = 44.0
    right: float = WIDTH - 8.0
    top: float = 8.0
    bottom: float = HEIGHT - 38.0
    x_label: str = ""
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def x(self, low: float, high: float) -> Scale:
        """Of the horizontal axis."""
        return Scale(low, high, self.left, self.right)

    def y(self, low: float, high: float) -> Scale:
        """Of the vertical axis."""
        return Scale(low, high, self.bottom, self.top)


def path(points: Iterable[tuple[float, float] | None]) -> str:
    """A line through points of the view box, broken where one is None."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:g} {point[1]:g}")
        pen = "L"
    return "".join(parts)


def steps(edges: Sequence[float], values: Sequence[float], x: Scale, y: Scale) -> str:
    """The outline of a histogram: `values` (N,) between `edges` (N + 1,)."""
    corners: list[tuple[float, float]] = []
    for value, left, right in zip(values, edges, edges[1:], strict=False):
        corners += [(x(left), y(value)), (x(right), y(value))]
    return path(corners)


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below; 1 for what is not above 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= value * (1 - 1e-9))


def count_ticks(top: float, y: Scale) -> list[Tick]:
    """None, half and all of a number of things."""
    values = (0.0, top / 2, top) if top >= 2 else (0.0, top)
    return [Tick(y(value), f"{value:,.0f}" if value == int(value) else f"{value:,.1f}") for value in values]


def percent_ticks(top: float, y: Scale) -> list[Tick]:
    """None, half and all of a share."""
    return [Tick(y(value), f"{100 * value:g} %") for value in (0.0, top / 2, top)]
