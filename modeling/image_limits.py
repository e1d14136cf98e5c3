"""Limits on simple figures of a picture, from training pictures: too dark, blurred, of an unusual colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

# What `modeling.preprocessing.image_quality` tells of a picture, in the order of the log's columns.
QUALITY_NAMES = ("brightness", "contrast", "blur", "red", "green", "blue")
# A limit lies a margin beyond the 1 % of training pictures on its side, in units of the way from the median to the 5 %
# there; the margin is the same for all limits. Limits at the most extreme pictures themselves jump with the sample: on
# HAM10000 a lesion half covered in black was refused in 38 % or in 100 % of cases, by the seed.
_WIDEST = 16.0
# Also where every training picture has the same figure; figures are in shares of full scale or logarithms.
_LEAST_MARGIN = 0.01
_HALVINGS = 14
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


def _log_contrast(quality: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.log10(quality["contrast"] + _DARK)


# Contrast and sharpness are log10: on its own scale a margin below a faint picture's contrast would reach under zero.
# Ratios of channels do not change with the light's strength; skin is red in any light that a camera balances.
FIGURES: dict[str, Figure] = {
    "brightness": Figure(lambda quality: quality["brightness"], "too_dark", "too_bright"),
    "contrast": Figure(_log_contrast, "low_contrast", "high_contrast"),
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


def fit_limits(
    values: Mapping[str, np.ndarray], refused_share: float, first: np.ndarray
) -> tuple[dict[str, Limit], np.ndarray]:
    """The tightest limits that refuse a share of pictures like these at most: that of each half under the other half's
    limits.

    Args:
        values: `figures` of training pictures, finite float64 (N,) each, N >= 2.
        refused_share: 0-1.
        first: bool (N,), the first half.

    Returns:
        The limits, and which pictures the other half's limits refuse, bool (N,).
    """

    def limits(margin: float, rows: np.ndarray) -> dict[str, Limit]:
        return {name: _limit(column[rows], margin) for name, column in values.items()}

    def refused(margin: float) -> np.ndarray:
        found = np.empty(len(first), dtype=bool)
        for half in (first, ~first):
            found[half] = outside(limits(margin, ~half), {name: column[half] for name, column in values.items()})
        return found

    too_tight, wide = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        margin = (too_tight + wide) / 2
        if refused(margin).mean() <= refused_share:
            wide = margin
        else:
            too_tight = margin
    return limits(wide, np.ones(len(first), dtype=bool)), refused(wide)


def _limit(column: np.ndarray, margin: float) -> Limit:
    lowest, low, middle, high, highest = np.quantile(column, [0.01, 0.05, 0.5, 0.95, 0.99])
    return Limit(
        low=float(lowest - max(margin * (middle - low), _LEAST_MARGIN)),
        high=float(highest + max(margin * (high - middle), _LEAST_MARGIN)),
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
