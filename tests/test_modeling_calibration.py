"""Calibration: undersampling is undone exactly, risks match observed rates, thresholds reach their sensitivity."""

import json

import numpy as np
import pytest

from modeling.calibration import (
    ClassScaling,
    IsotonicCalibrator,
    PlattCalibrator,
    apply_to_classes,
    calibrator_from_json,
    log_softmax,
    prior_correction,
    sigmoid,
)


def _lesions(size=4000, prevalence=0.1, seed=0):
    """0/1 labels and overconfident scores of a balanced sample, as class-balanced training gives them."""
    rng = np.random.default_rng(seed)
    labels = rng.random(size) < prevalence
    evidence = rng.normal(size=size) + 1.5 * labels
    return labels, sigmoid(2.0 * 1.5 * (evidence - 0.75))


def test_prior_correction_is_the_beta_formula_for_two_classes():
    sampled = np.linspace(0, 1, 11)
    beta = (0.001 / 0.999) / (0.5 / 0.5)
    corrected = prior_correction(np.stack([1 - sampled, sampled], 1), [0.5, 0.5], [0.999, 0.001])
    np.testing.assert_allclose(corrected[:, 1], beta * sampled / (beta * sampled + 1 - sampled))


def test_prior_correction_restores_the_bayes_probabilities_of_a_resampled_set():
    rng = np.random.default_rng(0)
    likelihood = rng.random((50, 4))
    sampling, population = np.array([0.25, 0.25, 0.4, 0.1]), np.array([0.7, 0.2, 0.05, 0.05])
    posterior = [likelihood * prior / (likelihood * prior).sum(1, keepdims=True) for prior in (sampling, population)]
    np.testing.assert_allclose(prior_correction(posterior[0], sampling, population), posterior[1])
    np.testing.assert_allclose(prior_correction(posterior[0], sampling, sampling), posterior[0])


def test_prior_correction_of_classes_without_population():
    corrected = prior_correction([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]], [0.4, 0.4, 0.2], [0.5, 0.5, 0.0])
    np.testing.assert_allclose(corrected[0], [0.625, 0.375, 0.0])
    np.testing.assert_allclose(corrected[1], [0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("sampling", "population", "message"),
    [
        ([1.0, 0.0], [0.9, 0.1], "sampling_prior of class 1 is 0"),
        ([0.5, 0.3, 0.2], [0.9, 0.1], "sampling_prior is .* expected 2"),
        ([0.5, 0.5], [1.1, -0.1], "population_prior is"),
    ],
)
def test_prior_correction_refuses_impossible_priors(sampling, population, message):
    with pytest.raises(ValueError, match=message):
        prior_correction(np.full((3, 2), 0.5), sampling, population)


def test_rescaled_classes_sum_to_the_risk_and_keep_their_proportions():
    probabilities = np.array([[0.2, 0.1, 0.4, 0.3], [0.0, 0.0, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    malignant = np.array([True, True, False, False])
    scaled = apply_to_classes(probabilities, malignant, np.array([0.6, 0.1, 0.9]))
    np.testing.assert_allclose(scaled[:, malignant].sum(1), [0.6, 0.1, 0.9])
    np.testing.assert_allclose(scaled.sum(1), 1.0)
    np.testing.assert_allclose(scaled[0], [0.4, 0.2, 0.4 * 4 / 7, 0.4 * 3 / 7])
    np.testing.assert_allclose(scaled[1, :2], 0.05)


@pytest.mark.parametrize("kind", [PlattCalibrator, IsotonicCalibrator])
def test_calibrated_risks_match_observed_rates_and_keep_the_order(kind):
    labels, scores = _lesions()
    calibrator = kind.fit(scores, labels)
    fresh_labels, fresh_scores = _lesions(seed=1)
    calibrated = calibrator.transform(fresh_scores)
    for chunk in np.array_split(np.argsort(calibrated), 4):
        assert calibrated[chunk].mean() == pytest.approx(fresh_labels[chunk].mean(), abs=0.03)
    assert (np.diff(calibrator.transform(np.sort(fresh_scores))) > 0).all()
    assert 0 < calibrated.min() and calibrated.max() < 1


@pytest.mark.parametrize("kind", [PlattCalibrator, IsotonicCalibrator])
def test_calibrators_survive_json_exactly(kind):
    labels, scores = _lesions(500)
    calibrator = kind.fit(scores, labels)
    restored = calibrator_from_json(json.loads(json.dumps(calibrator.to_json(), allow_nan=False)))
    np.testing.assert_array_equal(restored.transform(scores), calibrator.transform(scores))


@pytest.mark.parametrize("kind", [PlattCalibrator, IsotonicCalibrator])
@pytest.mark.parametrize(
    ("labels", "scores", "low", "high"),
    [
        ([0] * 20, np.linspace(0.1, 0.9, 20), 0, 0.2),
        ([1] * 20, np.linspace(0.1, 0.9, 20), 0.8, 1),
        ([0] * 15 + [1] * 5, np.full(20, 0.9), 0.2, 0.3),
        ([0] * 19 + [1], np.append(np.full(19, 1e-9), 1.0), 0, 1),
        ([], [], 0, 1),
    ],
    ids=["no_malignant", "no_benign", "constant", "separated", "empty"],
)
def test_degenerate_rows_give_finite_moderate_risks(kind, labels, scores, low, high):
    calibrated = kind.fit(np.array(scores), np.array(labels)).transform(np.array([0.1, 0.5, 0.9]))
    assert np.isfinite(calibrated).all() and (np.diff(calibrated) >= 0).all()
    assert low <= calibrated[2] <= high


def test_platt_never_turns_a_misleading_score_around():
    labels, scores = _lesions(500)
    calibrated = PlattCalibrator.fit(1 - scores, labels).transform(np.array([0.1, 0.9]))
    assert 0 < calibrated[1] - calibrated[0] < 0.01
    assert calibrated.mean() == pytest.approx(labels.mean(), abs=0.02)


def test_an_unknown_calibrator_is_refused():
    with pytest.raises(ValueError, match="'beta'; expected one of"):
        calibrator_from_json({"kind": "beta"})


def test_class_scaling_undoes_balanced_training_and_overconfidence():
    rng = np.random.default_rng(2)
    population = np.array([0.9, 0.07, 0.03])
    labels = rng.choice(3, size=5000, p=population)
    evidence = rng.normal(size=(5000, 3)) + 1.5 * np.eye(3)[labels]
    overconfident = log_softmax(3.0 * evidence)  # the truth under equal priors is 1.5 * evidence
    scaling = ClassScaling.fit(overconfident, labels, np.full(3, 1 / 3), np.bincount(labels) / 5000)
    assert scaling.slope == pytest.approx(0.5, abs=0.05)
    probabilities = np.exp(scaling.transform(overconfident))
    np.testing.assert_allclose(probabilities.mean(0), population, atol=0.01)


def test_class_scaling_of_a_class_with_two_rows_stays_near_the_prior_correction():
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [300, 98, 2])
    scores = log_softmax(rng.normal(size=(400, 3)) + 2 * np.eye(3)[labels])
    row_prior = np.bincount(labels) / 400
    scaling = ClassScaling.fit(scores, labels, np.full(3, 1 / 3), row_prior)
    assert np.exp(scaling.transform(scores))[:, 2].mean() == pytest.approx(2 / 400, abs=0.004)


def test_class_scaling_of_absent_classes_is_finite():
    scores = log_softmax(np.random.default_rng(4).normal(size=(40, 3)))
    scaling = ClassScaling.fit(scores, np.repeat([0, 1], 20), np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.5, 0.0]))
    assert np.isfinite(scaling.transform(scores)).all() and max(map(abs, scaling.bias)) < 10
