"""Epochs: class-balanced, fresh negatives, a pure function of seed and epoch."""

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipelines.epoch_sampling import EpochCursor, EpochOrder, SamplingConfig, class_shares, draw_epoch
from modeling.schema import TaskSpec


def task(classes, malignant):
    return TaskSpec(name="t", fold_group="patient_id", label_column="y", classes=classes, malignant=malignant)


BINARY = task(["benign", "malignant"], ["malignant"])
SEVEN = task(list("abcdefg"), ["a", "b"])


def test_negatives_per_positive_sets_the_malignant_share():
    shares = class_shares(np.array([1000, 10]), BINARY, SamplingConfig(negatives_per_positive=3))
    assert shares == pytest.approx([0.75, 0.25])


def test_the_ratio_holds_with_several_malignant_classes():
    counts = np.array([5, 50, 100, 200, 0, 20, 10])
    shares = class_shares(counts, SEVEN, SamplingConfig(negatives_per_positive=4, class_balance=1.0))
    assert shares[:2].sum() == pytest.approx(0.2)
    assert shares[0] == pytest.approx(shares[1])
    assert shares[4] == 0


@pytest.mark.parametrize(("balance", "expected"), [(0.0, [0.8, 0.2]), (1.0, [0.5, 0.5])])
def test_class_balance_goes_from_natural_to_equal(balance, expected):
    assert class_shares(np.array([80, 20]), BINARY, SamplingConfig(class_balance=balance)) == pytest.approx(expected)


def test_rare_rows_are_seen_equally_often_and_common_ones_at_most_once():
    labels = np.array([0] * 900 + [1] * 10)
    index = draw_epoch(labels, np.array([0.5, 0.5]), 64, seed=1, epoch=0)
    counts = np.bincount(index, minlength=len(labels))
    assert len(index) == 64
    assert counts[labels == 0].max() == 1
    assert set(counts[labels == 1]) == {3, 4}


def test_an_epoch_is_a_function_of_seed_and_epoch_and_negatives_are_fresh():
    labels = np.array([0] * 900 + [1] * 10)
    shares = np.array([0.9, 0.1])
    first, again = (draw_epoch(labels, shares, 100, seed=3, epoch=5) for _ in range(2))
    other = draw_epoch(labels, shares, 100, seed=3, epoch=6)
    assert np.array_equal(first, again)
    assert not set(first[labels[first] == 0]) & set(other[labels[other] == 0])


def test_every_negative_is_seen_once_before_any_is_seen_again():
    labels = np.array([0] * 900 + [1] * 10)
    seen = []
    for epoch in range(10):
        index = draw_epoch(labels, np.array([0.9, 0.1]), 100, seed=3, epoch=epoch)
        seen += index[labels[index] == 0].tolist()
    assert sorted(seen) == list(range(900))
    # The next round is shuffled anew.
    again = draw_epoch(labels, np.array([0.9, 0.1]), 100, seed=3, epoch=10)
    assert set(again[labels[again] == 0]) != set(seen[:90])


def test_an_absent_class_is_skipped():
    index = draw_epoch(np.array([0, 0, 0, 2, 2]), np.array([0.6, 0.0, 0.4]), 10, seed=0, epoch=0)
    assert len(index) == 10


def test_the_cursor_is_zero_before_the_first_announcement_and_decides_the_epoch(tmp_path):
    cursor = EpochCursor(str(tmp_path / "runs" / "fold_0.epoch"))
    labels = np.array([0] * 50 + [1] * 5)
    order = EpochOrder(labels, np.array([0.5, 0.5]), 20, 7, cursor)
    assert order()[0] == 0
    cursor.announce(4)
    epoch, index = order()
    assert epoch == 4
    assert np.array_equal(index, draw_epoch(labels, np.array([0.5, 0.5]), 20, 7, 4))


@pytest.mark.parametrize("field", [{"class_balance": 1.5}, {"negatives_per_positive": 0}, {"ratio": 3}])
def test_bad_sampling_is_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        SamplingConfig.model_validate(field)
