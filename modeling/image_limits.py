"""Limits on simple figures of a picture, from training pictures: too dark, blurred, of an unusual colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

# A limit lies beyond the most extreme rows it keeps, by this share of the way from the median to the 5 % on its side:
# what comes after training is a little wider than what was seen.
_MARGIN = 0.4
# Also where every training picture has the same figure; figures are in shares of full scale or logarithms.
_LEAST_MARGIN = 0.01
_DARK = 1.0 / 255.0


class Refusal(NamedTuple):
    """One reason not to score a picture: a stable code for programs, and a line for people with figure and limit."""

    reason: str
    detail: str


class Figure(NamedTuple):
    """A figure that is checked: how it follows from `image_quality`, and the reasons below and above its limits."""

    of: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    too_low: str
    too_high: str


def _log_ratio(first: str, second: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    def ratio(quality: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.log((quality[first] + _DARK) / (quality[second] + _DARK))

    return ratio


# Ratios of channels do not change with the light's strength; skin is red in any light that a camera balances.
FIGURES: dict[str, Figure] = {
    "brightness": Figure(lambda quality: quality["brightness"], "too_dark", "too_bright"),
    "contrast": Figure(lambda quality: quality["contrast"], "low_contrast", "high_contrast"),
    "sharpness": Figure(lambda quality: quality["blur"], "blurred", "noisy"),
    "redness": Figure(_log_ratio("red", "green"), "unusual_colour", "unusual_colour"),
    "blueness": Figure(_log_ratio("blue", "green"), "unusual_colour", "unusual_colour"),
}


class Limit(BaseModel):
    """A picture is kept while its figure lies between these, both included."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Limit:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


def figures(quality: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`FIGURES` of pictures, float64 (N,) each, from the figures of `image_quality` (N,) each."""
    columns = {name: np.atleast_1d(np.asarray(values, np.float64)) for name, values in quality.items()}
    return {name: figure.of(columns) for name, figure in FIGURES.items()}


def outside(limits: Mapping[str, Limit], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool (N,): pictures with a figure beyond its limits; one that is no number is beyond them."""
    kept = [(values[name] >= limit.low) & (values[name] <= limit.high) for name, limit in limits.items()]
    return ~np.logical_and.reduce(kept)


def fit_limits(values: Mapping[str, np.ndarray], refused_share: float) -> dict[str, Limit]:
    """The tightest limits, equally far into every tail, that together refuse at most a share of these pictures.

    Args:
        values: `figures` of training pictures, finite float64 (N,) each, N >= 1.
        refused_share: 0-1, of all N.
    """
    ordered = {name: np.sort(column) for name, column in values.items()}
    number = len(next(iter(ordered.values())))

    def limits(left_out: int) -> dict[str, Limit]:
        return {name: _limit(column, left_out) for name, column in ordered.items()}

    allowed = int(refused_share * number)
    # The most rows that each side may leave out, by bisection: fewer never refuse more.
    fits, too_many = 0, number // 2 + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if outside(limits(middle), values).sum() <= allowed:
            fits = middle
        else:
            too_many = middle
    return limits(fits)


def _limit(ordered: np.ndarray, left_out: int) -> Limit:
    left_out = min(left_out, (len(ordered) - 1) // 2)
    low, middle, high = np.quantile(ordered, [0.05, 0.5, 0.95])
    return Limit(
        low=float(ordered[left_out] - max(_MARGIN * (middle - low), _LEAST_MARGIN)),
        high=float(ordered[-1 - left_out] + max(_MARGIN * (high - middle), _LEAST_MARGIN)),
    )


def refusals(limits: Mapping[str, Limit], values: Mapping[str, np.ndarray], row: int) -> list[Refusal]:
    """Why one picture is refused; a reason that two figures give is listed once, with the first."""
    found: dict[str, Refusal] = {}
    for name, limit in limits.items():
        value, figure = float(values[name][row]), FIGURES[name]
        if limit.low <= value <= limit.high:
            continue
        too_low = not value > limit.high
        reason = figure.too_low if too_low else figure.too_high
        bound = f"at least {limit.low:.3g}" if too_low else f"at most {limit.high:.3g}"
        found.setdefault(reason, Refusal(reason, f"{name} {value:.3g}, expected {bound}"))
    return list(found.values())
