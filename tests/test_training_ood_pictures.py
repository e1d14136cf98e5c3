"""Unusable pictures come out the same each time, in the right format, and show what their kind says."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.synthetic_lesions import LesionAppearance, render_lesion
from modeling.preprocessing import image_quality
from training.ood_pictures import CORRUPTIONS, NON_LESIONS, SIDE

SPOILT = {kind.name: kind for kind in CORRUPTIONS}


@pytest.fixture(scope="module")
def lesion():
    return render_lesion(LesionAppearance(), np.random.default_rng(0), 150)[:120]


def test_names_are_unique_and_both_sets_hold_kinds_out():
    names = [kind.name for kind in NON_LESIONS + CORRUPTIONS]
    assert len(set(names)) == len(names)
    for kinds in (NON_LESIONS, CORRUPTIONS):
        assert {kind.held_out for kind in kinds} == {True, False}


@pytest.mark.parametrize("kind", NON_LESIONS, ids=lambda kind: kind.name)
def test_a_picture_that_is_no_lesion_is_drawn_alike_from_one_seed_and_otherwise_from_another(kind):
    first, again, other = (kind.make(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (SIDE, SIDE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("kind", CORRUPTIONS, ids=lambda kind: kind.name)
def test_a_spoilt_lesion_keeps_its_format_and_leaves_the_original_alone(kind, lesion):
    before = lesion.copy()
    spoilt = kind.make(lesion, np.random.default_rng(0))
    assert spoilt.shape == lesion.shape and spoilt.dtype == np.uint8
    assert np.array_equal(lesion, before)
    assert np.abs(spoilt.astype(int) - lesion).mean() > 0.5


def test_strengths_are_what_they_say(lesion):
    def made(name):
        return SPOILT[name].make(lesion, np.random.default_rng(0))

    sharpness = [
        image_quality(picture)["blur"]
        for picture in (lesion, *map(made, ("blurred_slightly", "blurred", "blurred_heavily")))
    ]
    assert sharpness == sorted(sharpness, reverse=True)
    assert made("darkened").mean() == pytest.approx(lesion.mean() / 4, abs=1)
    assert (made("cut_out") == 0).all(axis=2).mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(made("channels_swapped")[..., 0], lesion[..., 2])
    assert np.ptp(made("greyscale"), axis=2).max() == 0
    assert made("noisy").astype(float).std() > lesion.astype(float).std() + 20
