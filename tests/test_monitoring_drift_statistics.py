"""Distances are the textbook ones, and their thresholds hold for rows that come in patients."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from monitoring import drift_statistics
from monitoring.drift_statistics import (
    Feature,
    categorical,
    distance,
    feature_drift,
    jensen_shannon,
    kolmogorov_smirnov,
)


def patients(rng: np.random.Generator, num: int, rows: tuple[int, int], between: float, num_features: int = 12):
    """(values (N, F), groups (N,)): `between` = the share of the variance that lies between patients."""
    groups = np.repeat(np.arange(num), rng.integers(rows[0], rows[1] + 1, num))
    own = rng.normal(size=(num, num_features))[groups]
    values = np.sqrt(between) * own + np.sqrt(1 - between) * rng.normal(size=own.shape)
    values[:, 0] = np.exp(values[:, 0])
    return values, groups


def judge(reference, current, rate: float = 0.01, seed: int = 0, num_resamples: int = 400, names=None):
    names = names or [f"f{index}" for index in range(reference[0].shape[1])]
    features = [
        Feature(name, "numeric", reference[0][:, index], current[0][:, index]) for index, name in enumerate(names)
    ]
    return feature_drift(features, reference[1], current[1], rate, num_resamples, seed)


def test_distances_equal_the_textbook(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=80).round(1), rng.normal(0.3, 1.2, size=50).round(1)
    assert kolmogorov_smirnov(first, second) == pytest.approx(stats.ks_2samp(first, second).statistic)
    a, b = rng.choice(list("xyz"), 90), rng.choice(list("yzw"), 40)
    shares = [[np.mean(side == letter) for letter in "wxyz"] for side in (a, b)]
    assert distance(categorical("c", a, b)) == pytest.approx(jensenshannon(*shares), abs=1e-6)


@pytest.mark.parametrize(("rate", "alarms"), [(0.05, 5), (0.025, 2), (0.015, 1), (0.001, 1)])
def test_of_exchangeable_days_no_more_than_the_rate_exceed_their_threshold(rate, alarms):
    # Each of a hundred days once as the day, the others as the draws; under a hundred draws tell of no rarer day.
    distances = np.linspace(0.2, 0.9, 100)
    drifted = 0
    for day in range(100):
        measured = drift_statistics.Measured("f", "ks_distance", distances[day], 9, 9)
        calibration = drift_statistics.Calibration([measured], np.delete(distances, day)[None])
        drifted += drift_statistics.judge([calibration], rate)[0][0].drifted
    assert drifted == alarms


def test_resampled_distances_are_those_of_the_resampled_rows():
    """The vectorised path must measure what the plain functions measure."""
    rng = np.random.default_rng(0)
    values, groups = patients(rng, 9, (1, 5), 0.5, 2)
    letters = rng.integers(0, 3, len(values))
    draws = drift_statistics._Draws(np.random.default_rng(1), 20, 9, 7)
    weights = draws.row_weights(groups, np.array([2, 1, 9, 3, 3, 1, 2]), 9)
    fast = drift_statistics._kolmogorov_smirnov_weighted(values[:, 0].round(1), weights)
    fast_letters = drift_statistics._jensen_shannon_weighted(letters, weights)
    counts = [np.concatenate([side[i] for side in weights]).astype(int) for i in (0, 1)]
    assert (counts[1].sum(axis=1) == 21).all()
    for index in range(20):
        rows = [np.repeat(np.arange(len(values)), side[index]) for side in counts]
        expected = kolmogorov_smirnov(*(values[side, 0].round(1) for side in rows))
        assert fast[index] == pytest.approx(expected, abs=1e-5)
        assert fast_letters[index] == pytest.approx(jensen_shannon(*(letters[side] for side in rows)), abs=1e-5)


def test_a_drawn_day_holds_whole_patients_of_the_days_sizes():
    groups = np.repeat([0, 1, 2], [4, 6, 2])
    draws = drift_statistics._Draws(np.random.default_rng(0), 200, 3, 2)
    ((of_reference, of_current),) = draws.row_weights(groups, np.array([3, 3]), 3)
    for patient in range(3):
        of_patient = of_reference[:, groups == patient]
        assert (of_patient == of_patient[:, :1]).all()
    per_patient = np.stack([of_current[:, groups == patient].sum(axis=1) for patient in range(3)], axis=1)
    assert set(np.unique(per_patient)) == {0, 3, 6}
    alone = (per_patient == 3).sum(axis=1) == 2
    assert of_current[alone][:, groups < 2].max() == 1  # a patient with rows enough gives distinct ones
    assert of_current.max(axis=0).min() > 0  # every row is drawn sooner or later


def test_unchanged_days_of_few_patients_rarely_alarm_while_row_wise_thresholds_often_would():
    rng = np.random.default_rng(7)
    ours, row_wise = [], []
    for seed in range(25):
        reference, day = patients(rng, 45, (4, 10), 0.9), patients(rng, 50, (2, 5), 0.9)
        ours.append(any(verdict.drifted for verdict in judge(reference, day, 0.01, seed, 200)))
        alone = [(values, np.arange(len(values))) for values, _ in (reference, day)]
        row_wise.append(any(verdict.drifted for verdict in judge(*alone, 0.01, seed, 200)))
    assert sum(ours) <= 2  # 0.25 expected
    assert sum(row_wise) >= 13


def test_a_real_shift_is_found_and_named():
    rng = np.random.default_rng(3)
    reference, (values, groups) = patients(rng, 45, (4, 10), 0.5), patients(rng, 50, (2, 5), 0.5)
    values[:, 4] += 1.2
    verdicts = judge(reference, (values, groups))
    assert [verdict.name for verdict in verdicts if verdict.drifted] == ["f4"]
    assert judge(reference, (values, groups)) == verdicts  # the same seed, the same verdict


def test_missing_values_are_left_out_and_counted():
    rng = np.random.default_rng(3)
    reference, day = patients(rng, 40, (4, 6), 0.5, 2), patients(rng, 40, (3, 4), 0.5, 2)
    reference[0][::3, 1] = np.nan
    day[0][5:, 1] = np.nan
    full, sparse = judge(reference, day)
    assert (sparse.n_reference, sparse.n_current) == (int(np.isfinite(reference[0][:, 1]).sum()), 5)
    assert sparse.threshold > 1.3 * full.threshold  # five rows tell less


def test_categories_drift_and_new_ones_count():
    rng = np.random.default_rng(0)
    groups, day_groups = np.repeat(np.arange(60), 5), np.repeat(np.arange(50), 3)
    reference = rng.choice(["back", "arm"], 300).astype(object)
    same = rng.choice(["back", "arm"], 150).astype(object)
    new = np.where(rng.random(150) < 0.3, "foot", same).astype(object)
    verdicts = feature_drift(
        [categorical("same", reference, same), categorical("new", reference, new)],
        groups,
        day_groups,
        0.01,
        400,
    )
    assert [verdict.drifted for verdict in verdicts] == [False, True]


def test_a_first_patient_of_a_rare_kind_is_no_alarm_but_many_are():
    groups, day_groups = np.repeat(np.arange(25), 8), np.repeat(np.arange(50), 4)
    reference = np.full(200, "present", dtype=object)
    verdicts = []
    for num_patients in (1, 2, 15):
        day = np.where(day_groups < num_patients, "missing", "present").astype(object)
        verdicts += feature_drift([categorical("age", reference, day)], groups, day_groups, 0.01, 400)
    assert [verdict.drifted for verdict in verdicts] == [False, False, True]


def test_a_tiny_shift_of_very_many_rows_is_no_alarm_and_costs_little_memory():
    rng = np.random.default_rng(0)
    reference, day = rng.normal(size=(20_000, 1)), rng.normal(0.1, 1, size=(40_000, 1))
    (verdict,) = judge((reference, np.arange(20_000)), (day, np.arange(40_000)), num_resamples=100)
    assert not verdict.drifted and verdict.threshold >= drift_statistics.MINIMUM_DISTANCE
    assert verdict.n_current == 40_000


def test_a_constant_column_that_moves_is_found():
    groups = np.repeat(np.arange(30), 4)
    constant, moved = np.ones(120), np.where(np.arange(120) % 3 == 0, 2.0, 1.0)
    (same,) = feature_drift([Feature("c", "numeric", constant, constant)], groups, groups, 0.01, 100)
    (other,) = feature_drift([Feature("c", "numeric", constant, moved)], groups, groups, 0.01, 100)
    assert (same.distance, same.drifted, other.drifted) == (0.0, False, True)
    assert feature_drift([], groups, groups, 0.01) == []


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
@pytest.mark.parametrize("side", ["reference", "current"])
def test_a_feature_whose_few_values_calibration_left_out_is_not_judged_and_spoils_no_other(monkeypatch, side, kind):
    monkeypatch.setattr(drift_statistics, "MAX_CALIBRATION_ROWS", 150)
    rng = np.random.default_rng(3)
    sides = {"reference": patients(rng, 45, (4, 6), 0.5, 2), "current": patients(rng, 50, (4, 6), 0.5, 2)}
    sides["current"][0][:, 1] += 1.5
    values, groups = sides[side]
    # The only patient with values has more rows than calibration takes.
    known = np.append(np.zeros(len(groups), bool), np.ones(151, bool))
    sides[side] = (np.concatenate([values, rng.normal(size=(151, 2))]), np.append(groups, np.repeat(999, 151)))
    whole = [
        Feature(f"f{index}", "numeric", sides["reference"][0][:, index], sides["current"][0][:, index])
        for index in (0, 1)
    ]
    columns = {name: np.ones(len(groups)) for name, (_, groups) in sides.items()}
    columns[side][~known] = np.nan
    if kind == "categorical":
        columns = {name: np.where(np.isnan(c), -1, 0) for name, c in columns.items()}
    rare = Feature("rare", kind, **columns, categories=("yes",))
    both = sides["reference"][1], sides["current"][1]
    alone = feature_drift(whole, *both, 0.01, 200)
    assert feature_drift([whole[0], rare, whole[1]], *both, 0.01, 200) == alone
    assert [verdict.drifted for verdict in alone] == [False, True]
    assert feature_drift([rare], *both, 0.01, 200) == []
