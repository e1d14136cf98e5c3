"""Boosting from given logits: missing values carry no signal, growth is exact and repeatable."""

import numpy as np
import pytest

from modeling.calibration import log_softmax
from modeling.residual_boosting import (
    MANY_ROWS,
    finish,
    grow,
    leave_out_at_random,
    load_booster,
    raw_scores,
    start_booster,
)

PARAMETERS = {"num_leaves": 4, "min_data_in_leaf": 5, "seed": 1, "num_threads": 1, "bagging_fraction": 0.8}
MALIGNANT = np.array([False, True])


def _rows(num_classes=2, size=300):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, size)
    matrix = np.stack([labels + rng.normal(size=size), rng.normal(size=size)], 1).astype(np.float32)
    return matrix, log_softmax(np.zeros((size, num_classes))), labels


def test_gaps_are_filled_from_their_own_column():
    encoded = np.array([[1.0, np.nan, np.nan], [np.nan, 5.0, np.nan], [3.0, 6.0, np.nan]])
    filled = leave_out_at_random(encoded, 0.0, np.random.default_rng(0))
    assert filled[1, 0] in (1.0, 3.0) and filled[0, 1] in (5.0, 6.0)
    assert np.isnan(filled[:, 2]).all()
    assert np.isnan(encoded[1, 0])  # the caller's rows stay as they are


def test_values_are_left_out_independently_of_what_was_missing():
    rng = np.random.default_rng(1)
    encoded = rng.normal(size=(8000, 4))
    was_missing = rng.random(8000) < 0.3
    encoded[was_missing, 0] = np.nan
    missing = np.isnan(leave_out_at_random(encoded, 0.4, rng))
    assert missing[:, 1].mean() == pytest.approx(0.2, abs=0.02)  # 40 % of the rows lose half of their values on average
    assert missing[was_missing, 0].mean() == pytest.approx(missing[~was_missing, 0].mean(), abs=0.03)
    assert 0.28 < missing.any(axis=1).mean() < 0.4


def test_growing_in_steps_equals_growing_at_once():
    matrix, start, labels = _rows()
    at_once, in_steps = (start_booster(matrix, start, labels, MALIGNANT, [], PARAMETERS) for _ in range(2))
    assert grow(at_once, 9) == 9
    assert grow(in_steps, 4) + grow(in_steps, 5) == 9
    whole = raw_scores(finish(at_once), matrix, MALIGNANT)
    np.testing.assert_array_equal(whole, raw_scores(finish(in_steps), matrix, MALIGNANT))
    parts = raw_scores(in_steps, matrix, MALIGNANT, 0, 4) + raw_scores(in_steps, matrix, MALIGNANT, 4, 5)
    np.testing.assert_allclose(parts, whole)


@pytest.mark.parametrize("malignant", [np.array([False, True]), np.array([True, False])])
def test_two_classes_correct_the_malignant_logit_whichever_column_it_has(malignant):
    matrix, start, labels = _rows()
    booster = start_booster(matrix, start, labels, malignant, [], PARAMETERS)
    grow(booster, 20)
    corrections = raw_scores(booster, matrix, malignant)
    assert (corrections[:, ~malignant] == 0).all()
    assert np.mean((start + corrections).argmax(1) == labels) > 0.65


def test_a_start_that_is_already_right_is_left_alone():
    matrix, _, labels = _rows(3)
    certain = log_softmax(12.0 * np.eye(3)[labels])
    booster = start_booster(matrix, certain, labels, np.array([True, False, False]), [], PARAMETERS)
    grow(booster, 10)
    corrected = certain + raw_scores(booster, matrix, np.array([True, False, False]))
    np.testing.assert_allclose(np.exp(log_softmax(corrected)), np.eye(3)[labels], atol=1e-4)


def test_too_few_rows_to_split_add_nothing():
    matrix, start, labels = (part[:6] for part in _rows())
    booster = start_booster(matrix, start, labels, MALIGNANT, [], PARAMETERS)
    grow(booster, 5)
    np.testing.assert_allclose(raw_scores(finish(booster), matrix, MALIGNANT), 0.0, atol=1e-12)


def test_a_missing_or_damaged_booster_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="booster_0.txt is missing"):
        load_booster(tmp_path / "booster_0.txt")
    (tmp_path / "booster_1.txt").write_text("tree\nnot a model\n")
    with pytest.raises(ValueError, match="booster_1.txt cannot be read"):
        load_booster(tmp_path / "booster_1.txt")


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_number_of_threads_changes_nothing(num_classes):
    matrix, start, labels = _rows(num_classes, size=MANY_ROWS + 1)
    mask = np.arange(num_classes) == num_classes - 1
    scores = []
    for threads in (1, 2):
        booster = start_booster(matrix, start, labels, mask, [], PARAMETERS | {"num_threads": threads})
        grow(booster, 5)
        few_rows = raw_scores(booster, matrix[:100], mask)
        scores.append(raw_scores(booster, matrix, mask))
        np.testing.assert_array_equal(scores[-1][:100], few_rows)
    np.testing.assert_array_equal(*scores)
