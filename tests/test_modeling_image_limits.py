"""Limits refuse no more training pictures than allowed, in every tail, and say which figure is beyond which limit."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from modeling.image_limits import FIGURES, Limit, figures, fit_limits, outside, refusals
from modeling.preprocessing import image_quality


def training_figures(number=2000, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "brightness": rng.normal(0.6, 0.08, number),
        "contrast": np.log10(rng.gamma(4.0, 0.03, number)),
        "sharpness": rng.normal(1.7, 0.4, number),
        "redness": rng.normal(0.3, 0.1, number),
        "blueness": rng.normal(0.0, 0.05, number),
    }


def fitted(values, share=0.005):
    return fit_limits(values, share, np.arange(len(values["brightness"])) % 2 == 0)[0]


@pytest.mark.parametrize("share", [0.005, 0.05])
def test_of_new_pictures_as_many_are_refused_as_asked_for(share):
    rates = [
        outside(fitted(training_figures(2000, seed), share), training_figures(5000, seed + 100)) for seed in range(6)
    ]
    assert np.mean(rates) == pytest.approx(share, rel=0.35)


def test_few_rows_leave_room_for_what_they_did_not_show():
    rates = [outside(fitted(training_figures(100, seed)), training_figures(5000, seed + 100)) for seed in range(10)]
    assert np.mean(rates) < 0.03


def test_rows_are_judged_by_the_limits_of_the_other_half():
    """Halves that differ show how far new pictures may lie; the same rows in mixed halves do not."""
    values = training_figures(2000)
    values["brightness"][:1000] += 0.35
    apart, mixed = np.arange(2000) < 1000, np.arange(2000) % 2 == 0
    widths = []
    for halves in (apart, mixed):
        limits, refused = fit_limits(values, 0.005, halves)
        assert refused.mean() <= 0.005
        widths.append(limits["contrast"].high - limits["contrast"].low)
    assert widths[0] > 1.5 * widths[1]


def test_a_figure_that_never_varied_still_allows_rounding():
    values = training_figures() | {"redness": np.zeros(2000)}
    limits = fitted(values)
    assert limits["redness"].low < -0.005 and limits["redness"].high > 0.005
    assert outside(limits, values).mean() <= 0.005
    coloured = {name: column[:1] for name, column in values.items()} | {"redness": np.array([0.2])}
    assert outside(limits, coloured).all()


@pytest.mark.parametrize(
    ("figure", "value", "reason"),
    [
        ("brightness", 0.05, "too_dark"),
        ("brightness", 0.99, "too_bright"),
        ("contrast", np.log10(1 / 255), "low_contrast"),
        ("contrast", 0.0, "high_contrast"),
        ("sharpness", -1.0, "blurred"),
        ("sharpness", 4.0, "noisy"),
        ("redness", -0.5, "unusual_colour"),
        ("blueness", 0.9, "unusual_colour"),
        ("brightness", float("nan"), "too_dark"),
    ],
)
def test_each_side_of_each_figure_has_its_reason_with_figure_and_limit(figure, value, reason):
    limits = fitted(training_figures())
    middle = {name: np.median(column) for name, column in training_figures().items()}
    values = {name: np.array([number]) for name, number in (middle | {figure: value}).items()}
    assert outside(limits, values).all()
    (refusal,) = refusals(limits, values, 0)
    assert refusal.reason == reason
    assert refusal.detail.startswith(f"{figure} {value:.3g}, expected at ")
    side = limits[figure].high if value > limits[figure].high else limits[figure].low
    assert refusal.detail.endswith(f"{side:.3g}")


def test_two_figures_with_one_reason_give_it_once():
    limits = fitted(training_figures())
    values = {name: np.array([np.median(column)]) for name, column in training_figures().items()}
    values |= {"redness": np.array([-1.0]), "blueness": np.array([1.0])}
    assert [refusal.reason for refusal in refusals(limits, values, 0)] == ["unusual_colour"]


def test_the_light_s_strength_changes_brightness_and_no_colour_figure():
    rng = np.random.default_rng(0)
    picture = np.clip(rng.normal([200, 140, 120], 12, (64, 64, 3)), 0, 255).astype(np.uint8)
    bright, dim = (figures(image_quality(image)) for image in (picture, picture // 2))
    assert bright["brightness"] > 1.8 * dim["brightness"]
    for name in ("redness", "blueness"):
        assert bright[name] == pytest.approx(dim[name], abs=0.02)
    swapped = figures(image_quality(np.ascontiguousarray(picture[..., ::-1])))
    assert swapped["blueness"] > 0.3 > 0 > bright["blueness"]
    assert set(bright) == set(FIGURES)


def test_limits_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match="above high"):
        Limit(low=1.0, high=0.0)
