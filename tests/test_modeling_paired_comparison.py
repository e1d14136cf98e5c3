"""Two models on the same lesions: differences are tight where both move together; who finds which cancer is told."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.metrics import partial_auc_above_tpr, roc_auc
from modeling.paired_comparison import ModelRisks, compare_models


def lesions(number=600, seed=0):
    rng = np.random.default_rng(seed)
    malignant = rng.random(number) < 0.2
    return malignant, rng.normal(size=number) + 2 * malignant, rng


def models(first, second, threshold=0.5):
    return ModelRisks(first, threshold), ModelRisks(second, threshold)


def test_differences_are_candidate_minus_champion_at_own_thresholds():
    malignant, signal, rng = lesions()
    worse = signal + rng.normal(size=len(signal))
    found = compare_models(malignant, np.arange(600), ModelRisks(worse, 0.2), ModelRisks(signal, 0.9), num_bootstrap=50)
    assert found.auc.value == pytest.approx(roc_auc(malignant, worse) - roc_auc(malignant, signal))
    assert found.pauc.candidate == pytest.approx(partial_auc_above_tpr(malignant, worse))
    sensitivities = (worse >= 0.2)[malignant].mean(), (signal >= 0.9)[malignant].mean()
    assert (found.sensitivity.candidate, found.sensitivity.champion) == pytest.approx(sensitivities)
    assert found.gained - found.lost == round((sensitivities[0] - sensitivities[1]) * malignant.sum())
    assert found.auc.low < found.auc.value < found.auc.high < 0


def test_pairing_sees_a_difference_that_the_models_own_intervals_hide():
    from modeling.resampling import clustered_bootstrap

    malignant, signal, rng = lesions(1500)
    slightly_worse = signal + 0.45 * rng.normal(size=len(signal))
    found = compare_models(malignant, np.arange(1500), *models(slightly_worse, signal), num_bootstrap=300)
    assert found.auc.high < 0
    own = [
        clustered_bootstrap(lambda r, s=s: roc_auc(malignant[r], s[r]), np.arange(1500), 300)
        for s in (slightly_worse, signal)
    ]
    assert own[0][1] > own[1][0]  # side by side they overlap


def test_patients_are_resampled_whole():
    malignant, signal, rng = lesions()
    other = signal + rng.normal(size=600)
    # Ten copies of each lesion as one patient tell no more than one of them.
    repeat = np.repeat(np.arange(600), 10)
    one = compare_models(malignant, np.arange(600), *models(other, signal), num_bootstrap=200)
    ten = compare_models(malignant[repeat], repeat, *models(other[repeat], signal[repeat]), num_bootstrap=200)
    assert ten.auc.high - ten.auc.low == pytest.approx(one.auc.high - one.auc.low, rel=0.02)
    assert (ten.n_malignant, ten.malignant_groups) == (10 * one.n_malignant, one.malignant_groups)


def test_the_same_model_twice_differs_by_nothing():
    malignant, signal, _ = lesions()
    found = compare_models(malignant, np.arange(600), *models(signal, signal), {"sex": ["f"] * 600}, 50)
    for difference in (found.auc, found.pauc, found.sensitivity, found.specificity):
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert (found.gained, found.lost) == (0, 0)


def test_what_cannot_be_measured_is_none():
    malignant, signal, _ = lesions()
    benign = compare_models(np.zeros(600, bool), np.arange(600), *models(signal, signal), num_bootstrap=20)
    assert benign.auc.value is benign.sensitivity.value is benign.auc.low is None
    assert benign.specificity.value == 0
    # Nine patients with cancer: no interval, but a difference.
    few = np.flatnonzero(malignant)[9:]
    keep = np.setdiff1d(np.arange(600), few)
    found = compare_models(malignant[keep], keep, *models(signal[keep], -signal[keep]), num_bootstrap=50)
    assert found.auc.low is None and found.auc.value > 0.5 and found.malignant_groups == 9


def test_subgroups_with_fewer_than_ten_cancers_are_left_out():
    malignant = np.array([True] * 30 + [False] * 70)
    site = np.array(["face"] * 12 + ["back"] * 9 + [None] * 9 + ["face"] * 70, dtype=object)
    blind_on_faces = np.where(np.arange(100) < 12, 0.0, 1.0)
    found = compare_models(malignant, np.arange(100), *models(blind_on_faces, np.ones(100)), {"site": site}, 0)
    (pair,) = found.subgroups
    assert (pair.column, pair.value, pair.n_malignant, pair.candidate, pair.champion) == ("site", "face", 12, 0.0, 1.0)
    assert (found.gained, found.lost) == (0, 12)
