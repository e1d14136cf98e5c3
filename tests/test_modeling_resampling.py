"""Intervals respect patients, and are not given where too few of them carry the cancers."""

import math

import numpy as np
import pytest

from modeling.metrics import roc_auc
from modeling.resampling import MIN_GROUPS, clustered_bootstrap


def test_bootstrap_draws_whole_patients():
    groups = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])

    def drawn_whole(rows):
        repeats = np.bincount(rows, minlength=len(groups))
        assert all(len(set(repeats[groups == group])) == 1 for group in range(6))
        return 0.0

    clustered_bootstrap(drawn_whole, groups, num_samples=20, seed=0)


def test_copies_of_a_lesion_do_not_narrow_the_interval():
    values = np.random.default_rng(6).normal(size=100)
    copies = np.repeat(values, 10)

    def width(data, groups):
        low, high = clustered_bootstrap(lambda rows: data[rows].mean(), groups, num_samples=400, seed=1)
        return high - low

    by_row = width(copies, np.arange(1000))
    by_patient = width(copies, np.repeat(np.arange(100), 10))
    assert by_patient == pytest.approx(width(values, np.arange(100)), rel=0.15)
    assert by_patient > 2.5 * by_row


def test_bootstrap_repeats_with_its_seed_and_rows_without_patient_stand_alone():
    values = np.arange(40.0)

    def interval(groups, seed):
        return clustered_bootstrap(lambda rows: values[rows].mean(), groups, num_samples=50, seed=seed)

    assert interval([""] * 40, 3) == interval(list(range(40)), 3)
    assert interval([""] * 40, 3) != interval([""] * 40, 4)


def test_interval_is_undefined_when_most_resamples_lack_positives():
    labels = np.zeros(200, dtype=int)
    scores = np.linspace(0, 1, 200)
    low, high = clustered_bootstrap(lambda rows: roc_auc(labels[rows], scores[rows]), range(200), 40, seed=0)
    assert math.isnan(low) and math.isnan(high)
    labels[150:] = 1
    low, high = clustered_bootstrap(lambda rows: roc_auc(labels[rows], scores[rows]), range(200), 40, seed=0)
    assert 0.9 < low <= high <= 1.0


@pytest.mark.parametrize("carriers", [1, 3, MIN_GROUPS - 1, MIN_GROUPS])
@pytest.mark.parametrize("rare", [1, 0])
def test_cancers_of_a_few_patients_have_no_interval(carriers, rare):
    """Sixty patients of five lesions; those of the rare kind, 1 = malignant, are all of a few of them."""
    rng = np.random.default_rng(carriers)
    patients = np.repeat(np.arange(60), 5)
    labels = np.where((patients < carriers) & (np.arange(300) % 5 < 3), rare, 1 - rare)
    scores = labels + rng.normal(0, 0.7, 300)

    def bounds(groups):
        return clustered_bootstrap(lambda rows: roc_auc(labels[rows], scores[rows]), groups, 100, 0, labels == 1)

    low, high = bounds(patients)
    assert math.isnan(low) == math.isnan(high) == (carriers < MIN_GROUPS)
    # Counted as if each lesion were a patient's, the same cancers would have one, and a narrow one from four on.
    assert carriers < 4 or np.isfinite(bounds(np.arange(300))).all()


def test_one_patient_has_no_interval():
    values = np.random.default_rng(1).normal(size=1000)
    assert np.isnan(clustered_bootstrap(lambda rows: values[rows].mean(), np.zeros(1000), 50, 0)).all()
