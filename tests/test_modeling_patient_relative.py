"""Patient-relative numbers: equal to a plain per-patient computation, and blind to every other patient."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from modeling.patient_relative import group_codes, is_missing, percentile_ranks, z_scores


@pytest.fixture
def lesions():
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(5, 2, size=(60, 3)), 1)  # one decimal: ties
    values[rng.random(values.shape) < 0.15] = np.nan
    return values, rng.integers(0, 9, 60)


def test_z_scores_and_ranks_equal_a_loop_over_patients(lesions):
    values, codes = lesions
    z, ranks = z_scores(values, codes), percentile_ranks(values, codes)
    for row, column in np.ndindex(values.shape):
        peers = values[codes == codes[row], column]
        peers = peers[~np.isnan(peers)]
        if np.isnan(values[row, column]):
            assert np.isnan(z[row, column]) and np.isnan(ranks[row, column])
            continue
        spread = peers.std()
        expected = (values[row, column] - peers.mean()) / spread if spread > 1e-6 else 0.0
        assert z[row, column] == pytest.approx(expected, abs=1e-9)
        rank = rankdata(np.append(peers, values[row, column]))[-1]
        assert ranks[row, column] == pytest.approx(
            (rankdata(peers)[peers == values[row, column]][0] - 0.5) / len(peers)
        )
        assert rank > 0


def test_other_patients_rows_change_nothing(lesions):
    values, codes = lesions
    mine = codes == codes[0]
    changed = np.where(mine[:, None], values, values * 100 + 7)
    for function in (z_scores, percentile_ranks):
        np.testing.assert_array_equal(function(changed, codes)[mine], function(values, codes)[mine])
        np.testing.assert_allclose(function(values[mine], codes[mine]), function(values, codes)[mine], atol=1e-12)


def test_a_lesion_on_its_own_and_equal_lesions_stand_in_the_middle():
    values = np.array([[3.7], [0.1], [0.1], [0.1]])
    codes = np.array([0, 1, 1, 1])
    np.testing.assert_array_equal(z_scores(values, codes), np.zeros((4, 1)))
    np.testing.assert_array_equal(percentile_ranks(values, codes), np.full((4, 1), 0.5))


def test_a_patient_of_a_thousand_lesions_among_small_ones():
    rng = np.random.default_rng(1)
    values = np.round(rng.normal(5, 2, size=(1200, 2)), 2)
    codes = rng.permutation(np.concatenate([np.zeros(1000, dtype=int), np.arange(1, 201)]))
    large = values[codes == 0]
    z, ranks = z_scores(values, codes), percentile_ranks(values, codes)
    np.testing.assert_allclose(z[codes == 0], (large - large.mean(axis=0)) / large.std(axis=0), atol=1e-9)
    np.testing.assert_allclose(ranks[codes == 0], (rankdata(large, axis=0) - 0.5) / 1000)
    assert (z[codes > 0] == 0).all() and (ranks[codes > 0] == 0.5).all()


def test_all_missing_and_empty_columns():
    values, codes = np.full((3, 2), np.nan), np.zeros(3, dtype=int)
    assert np.isnan(z_scores(values, codes)).all() and np.isnan(percentile_ranks(values, codes)).all()
    nothing = np.empty((0, 2)), np.empty(0, dtype=int)
    assert z_scores(*nothing).shape == percentile_ranks(*nothing).shape == (0, 2)
    assert z_scores(np.empty((3, 0)), codes).shape == (3, 0)


def test_lesions_without_a_patient_are_not_one_big_patient():
    codes = group_codes(["p1", None, "p2", float("nan"), "", "p1", pd.NA])
    assert codes[0] == codes[5]
    assert len(set(codes)) == 6


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), "", pd.NA, pd.NaT])
def test_marks_of_missing_values(value):
    assert is_missing(value)


@pytest.mark.parametrize("value", [0, 0.0, "unknown", False, np.int64(3)])
def test_values_that_are_not_missing(value):
    assert not is_missing(value)
