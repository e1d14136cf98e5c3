"""No patient on two sides, a gate split that never moves, and classes spread over all folds."""

import numpy as np
import pandas as pd
import pytest

from data_pipelines.stratified_folds import GATE_FOLD, assign_folds, check_groups, folds_by_value, gate_members

CLASSES = ["nv", "mel", "df"]


def population(num_groups=400, seed=0):
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"IP_{i:07d}" for i in range(num_groups)], rng.integers(1, 9, num_groups))
    labels = rng.choice(3, len(groups), p=[0.86, 0.1, 0.04])
    return labels, groups


def test_no_group_spans_two_folds_or_the_gate():
    labels, groups = population()
    folds = assign_folds(labels, groups, CLASSES, 5, 0.15, seed=0)
    for group in np.unique(groups):
        assert len(set(folds[groups == group])) == 1


def test_every_fold_has_its_share_of_every_class():
    labels, groups = population()
    folds = assign_folds(labels, groups, CLASSES, 4, 0.15, seed=0)
    assert sorted(set(folds)) == [GATE_FOLD, 0, 1, 2, 3]
    for label in range(3):
        share = [np.mean(labels[folds == fold] == label) for fold in range(4)]
        assert max(share) < 1.35 * min(share)


def test_the_gate_split_depends_on_nothing_but_the_group():
    labels, groups = population()
    folds = assign_folds(labels, groups, CLASSES, 3, 0.15, seed=0)
    before = dict(zip(groups, folds == GATE_FOLD, strict=True))
    # A later version: relabelled, reordered, other patients added, some gone, other folds and seed.
    new_labels, new_groups = population(700, seed=5)
    order = np.random.default_rng(1).permutation(len(new_groups))[:-300]
    new_labels, new_groups = new_labels[order], new_groups[order]
    after = assign_folds(new_labels, new_groups, CLASSES, 5, 0.15, seed=9)
    now = zip(new_groups, after == GATE_FOLD, strict=True)
    shared = [(before[group], gate) for group, gate in now if group in before]
    assert len(shared) > 500 and all(was == gate for was, gate in shared)


def test_the_gate_split_has_the_asked_share_of_groups_and_a_larger_one_contains_it():
    groups = np.array([f"HAM_{i:07d}" for i in range(20_000)])
    small, large = gate_members(groups, 0.15), gate_members(groups, 0.3)
    assert 0.14 < small.mean() < 0.16
    assert not gate_members(groups, 0.0).any() and gate_members(groups, 1.0).all()
    assert (large | ~small).all()


def test_known_patients_stay_where_they_were_in_every_release():
    """Changing the hash would put patients that trained old models into the gate split of new ones."""
    groups = np.array(["IP_0000001", "IP_0000002", "HAM_0000550", "HAM_0000055", "IP_4934005"])
    assert gate_members(groups, 0.5).tolist() == [False, True, True, False, False]


def test_the_seed_shuffles_the_folds_and_the_same_seed_repeats_them():
    labels, groups = population()
    first, again, other = (assign_folds(labels, groups, CLASSES, 3, 0.15, seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_a_class_with_fewer_groups_than_folds_is_named():
    labels, groups = population()
    labels[labels == 2] = 0
    labels[np.flatnonzero(groups == groups[0])] = 2
    with pytest.raises(ValueError, match=r"class 'df' has [01] groups outside the gate split; expected at least 3"):
        assign_folds(labels, groups, CLASSES, 3, 0.15, seed=0)


def test_a_leak_between_folds_cannot_pass_unseen():
    with pytest.raises(ValueError, match="1 groups span two folds, e.g. 'a' lies in 'north' and 'south'"):
        check_groups(np.array([0, 1, 1, -1]), np.array(["a", "a", "b", "c"]), ["north", "south"])
    with pytest.raises(ValueError, match="'a' lies in 'gate' and 'south'"):
        check_groups(np.array([-1, 1, 1]), np.array(["a", "a", "b"]), ["north", "south"])
    check_groups(np.array([-1, 1, 1]), np.array(["a", "b", "b"]), ["north", "south"])


def test_every_institution_is_a_fold_of_its_own_and_the_gate_split_stays():
    labels, groups = population()
    number = {group: i for i, group in enumerate(np.unique(groups))}
    clinics = pd.Series([["Wien", "Basel", "Sydney"][number[group] % 3] for group in groups])
    folds, names = folds_by_value(clinics, groups, 0.15, "attribution")
    assert names == ["Basel", "Sydney", "Wien"]
    gate = gate_members(groups, 0.15)
    assert ((folds == GATE_FOLD) == gate).all()
    for fold, name in enumerate(names):
        assert set(clinics[folds == fold]) == {name}
    check_groups(folds, groups, names)


@pytest.mark.parametrize(
    ("clinics", "says"),
    [
        (["a", None, "b", "b"], "fold_by = 'clinic': 1 rows have no value"),
        (["a", "a", "a", "a"], "fold_by = 'clinic': 1 values outside the gate split; expected at least 2"),
    ],
)
def test_a_column_that_makes_no_folds_is_refused(clinics, says):
    with pytest.raises(ValueError, match=says):
        folds_by_value(pd.Series(clinics), np.array(["1", "2", "3", "4"]), 0.0, "clinic")
