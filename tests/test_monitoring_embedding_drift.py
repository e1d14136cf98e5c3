"""The domain classifier finds a shift spread thinly over all dimensions and is not fooled by patients."""

from __future__ import annotations

import numpy as np

from monitoring import embedding_drift as module
from monitoring.embedding_drift import embedding_drift


def patients(rng: np.random.Generator, num: int, rows: tuple[int, int], between: float = 0.5):
    groups = np.repeat(np.arange(num), rng.integers(rows[0], rows[1] + 1, num))
    own = rng.normal(size=(num, 64))[groups]
    return np.sqrt(between) * own + np.sqrt(1 - between) * rng.normal(size=own.shape), groups


def judge(reference, current, **options):
    return embedding_drift(reference[0], current[0], reference[1], current[1], 0.005, **{"num_splits": 15, **options})


def test_a_shift_too_thin_for_any_single_dimension_is_found():
    rng = np.random.default_rng(0)
    reference, (values, groups) = patients(rng, 45, (4, 10), 0.2), patients(rng, 50, (2, 5), 0.2)
    shifted = judge(reference, (values + 0.3, groups))
    assert shifted.drifted and shifted.auc > 0.8
    assert shifted.n_current == len(values)


def test_a_shift_of_015_standard_deviations_is_found_in_one_day_of_some_hundred_rows():
    rng = np.random.default_rng(11)
    for seed in range(3):
        reference, (values, groups) = patients(rng, 90, (4, 10), 0.2), patients(rng, 100, (3, 6), 0.2)
        assert judge(reference, (values + 0.15, groups), seed=seed).drifted
        assert not judge(reference, (values, groups), seed=seed).drifted


def test_unchanged_days_stay_quiet_though_patients_differ():
    rng = np.random.default_rng(1)
    verdicts = [judge(patients(rng, 45, (4, 10), 0.9), patients(rng, 50, (2, 5), 0.9), seed=seed) for seed in range(6)]
    assert not any(verdict.drifted for verdict in verdicts)
    assert all(0.55 < verdict.threshold < 0.85 for verdict in verdicts)


def test_the_threshold_knows_how_few_splits_it_rests_on(monkeypatch):
    """With the spread of ten splits taken for the true one, 1.4 % of unchanged days were alarms instead of 0.5 %."""
    halves = iter([0.45, 0.55] * 5 + [0.5])
    monkeypatch.setattr(module, "domain_auc", lambda *_: next(halves))
    verdict = embedding_drift(np.zeros((40, 1)), np.zeros((40, 1)), np.arange(40), np.arange(40), 0.005, num_splits=10)
    # 20 against 20 patients spread by the root of two more than 40 against 40; 3.169: the tables' t with 10 degrees.
    assert abs((verdict.threshold - 0.5) / (0.05 / np.sqrt(2)) - 3.169) < 0.001


def test_the_verdict_does_not_hang_on_the_pseudonyms_of_patients():
    """Another key gives patients other pseudonyms and so other folds: with one partition the AUC spread by 0.019."""
    rng = np.random.default_rng(6)
    reference, (values, groups) = patients(rng, 60, (4, 10), 0.2), patients(rng, 40, (6, 10), 0.2)
    names = [np.random.default_rng(key).permutation(40)[groups] for key in range(12)]
    aucs = [judge(reference, (values + 0.15, name), num_splits=1).auc for name in names]
    assert 0 < np.std(aucs) < 0.012


def test_folds_hold_whole_patients():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 5)
    folds = module._folds(groups, rng)
    assert all(len(set(folds[groups == patient])) == 1 for patient in range(20))
    assert set(folds) == {0, 1, 2}


def test_too_few_patients_give_no_verdict():
    rng = np.random.default_rng(3)
    assert judge(patients(rng, 45, (4, 10)), patients(rng, 5, (20, 20))) is None
    assert judge(patients(rng, 8, (4, 10)), patients(rng, 50, (2, 5))) is None


def test_large_sides_are_thinned_by_whole_patients(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 120)
    rng = np.random.default_rng(4)
    reference, (values, groups) = patients(rng, 60, (5, 5), 0.2), patients(rng, 80, (5, 5), 0.2)
    verdict = judge(reference, (values + 1.0, groups))
    assert verdict.drifted and (verdict.n_reference, verdict.n_current) == (120, 120)


def test_the_same_seed_gives_the_same_verdict():
    rng = np.random.default_rng(5)
    sides = patients(rng, 30, (3, 6)), patients(rng, 30, (3, 6))
    assert judge(*sides) == judge(*sides) != judge(*sides, seed=1)
