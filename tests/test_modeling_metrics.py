"""Metrics: the partial AUC is the competition's, intervals respect patients, absent classes stay undefined."""

import json
import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from modeling.metrics import (
    adaptive_ece,
    balanced_accuracy,
    calibration_slope_intercept,
    evaluate,
    macro_f1,
    partial_auc_above_tpr,
    reliability,
    risk,
    roc_auc,
    roc_curve,
    sensitivity_specificity,
)
from modeling.schema import TaskSpec

BINARY = TaskSpec(
    name="binary",
    fold_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
)
MULTI = TaskSpec(
    name="multi", fold_group="lesion_id", label_column="dx", classes=["bcc", "mel", "nv"], malignant=["bcc", "mel"]
)


def _official_pauc(labels, scores, min_tpr):
    """The ISIC 2024 scorer: flipped labels, negated scores, scikit-learn's standardised partial AUC, unstandardised."""
    limit = 1 - min_tpr
    standardised = roc_auc_score(1 - np.asarray(labels), -np.asarray(scores), max_fpr=limit)
    return limit**2 / 2 + (limit - limit**2 / 2) * (2 * standardised - 1)


def _random_cases(count, seed=0):
    """Labels and scores of 2 to 400 lesions, half to one in a hundred malignant, mostly with ties, some of them all
    tied; a quarter of the cases has a single malignant lesion."""
    rng = np.random.default_rng(seed)
    for case in range(count):
        size = int(rng.integers(2, 400))
        labels = (rng.random(size) < rng.choice([0.5, 0.2, 0.05, 0.01])).astype(int)
        if case % 4 == 0 or not labels.any():
            labels[:] = 0
            labels[rng.integers(size)] = 1
        elif labels.all():
            labels[rng.integers(size)] = 0
        scores = labels * rng.uniform(-1, 3) + rng.normal(size=size)
        digits = int(rng.integers(-1, 4))
        yield labels, scores if digits == 3 else np.round(scores, digits)  # few digits: many ties


def test_partial_auc_is_the_competition_s_on_1000_random_cases_with_ties():
    tied, few = 0, 0
    for case, (labels, scores) in enumerate(_random_cases(1000)):
        standardised = roc_auc_score(1 - labels, -scores, max_fpr=0.2)
        official = 0.02 + 0.18 * (2 * standardised - 1)
        assert partial_auc_above_tpr(labels, scores) == pytest.approx(official, abs=1e-12), f"case {case}"
        tied += len(np.unique(scores)) < len(scores)
        few += labels.sum() == 1
    assert tied > 600 and few > 250


@pytest.mark.parametrize("min_tpr", [0.5, 0.95])
def test_partial_auc_is_the_official_one_above_other_sensitivities(min_tpr):
    rng = np.random.default_rng(0)
    for case in range(150):
        size = int(rng.integers(4, 60))
        labels = np.concatenate([[0, 1], rng.integers(0, 2, size)])
        scores = labels * rng.uniform(0, 3) + rng.normal(size=len(labels))
        scores = np.round(scores, int(rng.integers(0, 3)))  # few digits: many ties
        expected = _official_pauc(labels, scores, min_tpr)
        assert partial_auc_above_tpr(labels, scores, min_tpr) == pytest.approx(expected, abs=1e-12), case


def test_partial_auc_of_perfect_useless_and_inverted_scores():
    labels = np.repeat([0, 1], 50)
    assert partial_auc_above_tpr(labels, labels) == pytest.approx(0.2)
    assert partial_auc_above_tpr(labels, np.zeros(100)) == pytest.approx(0.02)
    assert partial_auc_above_tpr(labels, -labels) == pytest.approx(0.0)


def test_tiny_probabilities_keep_their_order():
    # 1 - p rounds 1e-20 and 1e-18 to the same number; negation does not.
    labels, scores = np.array([0, 1, 0, 1]), np.array([1e-20, 1e-18, 1e-21, 1e-17])
    assert partial_auc_above_tpr(labels, scores) == pytest.approx(0.2)


def test_roc_auc_and_class_metrics_equal_scikit_learn():
    rng = np.random.default_rng(1)
    for _ in range(30):
        labels, predicted = rng.integers(0, 4, 40), rng.integers(0, 4, 40)
        scores = np.round(rng.normal(size=40) + (labels > 1), 1)
        assert roc_auc(labels > 1, scores) == pytest.approx(roc_auc_score(labels > 1, scores))
        assert balanced_accuracy(labels, predicted) == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert macro_f1(labels, predicted) == pytest.approx(f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_metrics_are_undefined_without_both_classes(labels):
    scores = np.linspace(0.1, 0.3, len(labels))
    assert math.isnan(partial_auc_above_tpr(labels, scores))
    assert math.isnan(roc_auc(labels, scores))
    assert all(map(math.isnan, calibration_slope_intercept(labels, scores)))


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="1 NaN of 2"):
        roc_auc([0, 1], [0.1, float("nan")])


def test_sensitivity_counts_the_threshold_itself_as_positive():
    assert sensitivity_specificity([1, 1, 0, 0], [0.5, 0.4, 0.5, 0.1], 0.5) == (0.5, 0.5)
    sensitivity, specificity = sensitivity_specificity([0, 0], [0.5, 0.1], 0.5)
    assert math.isnan(sensitivity) and specificity == 0.5


def test_adaptive_ece_measures_a_shift_also_where_cancer_is_rare():
    rng = np.random.default_rng(2)
    rare = rng.beta(1, 200, 40_000)
    labels = rng.random(40_000) < rare
    assert adaptive_ece(labels, rare) < 0.002
    assert adaptive_ece(labels, rare + 0.05) == pytest.approx(0.05, abs=0.002)


def test_adaptive_ece_does_not_depend_on_row_order_with_ties():
    labels, tied = np.repeat([0, 1], 50), np.repeat(0.5, 100)
    assert adaptive_ece(labels, tied) == pytest.approx(0.0)
    order = np.random.default_rng(3).permutation(100)
    mixed = np.round(np.linspace(0, 1, 100), 1)
    assert adaptive_ece(labels[order], mixed[order]) == pytest.approx(adaptive_ece(labels, mixed))


def test_calibration_slope_is_logistic_regression_on_the_logit():
    rng = np.random.default_rng(4)
    logits = rng.normal(-2, 1.5, 3000)
    labels = rng.random(3000) < 1 / (1 + np.exp(-(0.5 * logits + 0.3)))
    slope, _ = calibration_slope_intercept(labels, 1 / (1 + np.exp(-logits)))
    reference = LogisticRegression(C=1e10, tol=1e-8).fit(logits[:, None], labels)
    assert slope == pytest.approx(reference.coef_[0, 0], abs=1e-3)
    assert slope == pytest.approx(0.5, abs=0.1)


def test_calibration_intercept_says_by_how_much_risks_are_too_low():
    rng = np.random.default_rng(5)
    logits = rng.normal(-2, 1, 20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-(logits + 0.7)))
    slope, intercept = calibration_slope_intercept(labels, 1 / (1 + np.exp(-logits)))
    assert (slope, intercept) == (pytest.approx(1, abs=0.1), pytest.approx(0.7, abs=0.1))


def test_calibration_slope_is_undefined_for_separated_or_constant_risks():
    slope, intercept = calibration_slope_intercept([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert math.isnan(slope) and math.isfinite(intercept)
    slope, intercept = calibration_slope_intercept([0, 0, 1, 1], [0.2] * 4)
    assert math.isnan(slope) and intercept == pytest.approx(math.log(4))


def test_evaluate_brackets_its_point_estimates():
    rng = np.random.default_rng(7)
    labels = (rng.random(600) < 0.2).astype(int)
    risks = 1 / (1 + np.exp(-(rng.normal(size=600) + 2 * labels - 1.5)))
    report = evaluate(BINARY, labels, np.stack([1 - risks, risks], 1), np.arange(600) // 3, 0.3, 100, 0)
    assert (report["n"], report["n_malignant"]) == (600, labels.sum())
    for name, whole in (("auc", roc_auc), ("pauc", partial_auc_above_tpr)):
        assert report[name]["value"] == pytest.approx(whole(labels, risks))
    for name in ("auc", "pauc", "balanced_accuracy"):
        assert report[name]["low"] < report[name]["value"] < report[name]["high"]
    assert report["balanced_accuracy"]["value"] == pytest.approx((report["sensitivity"] + report["specificity"]) / 2)
    assert report["recalls"] == {"benign": report["specificity"], "malignant": report["sensitivity"]}


def test_evaluate_intervals_know_that_copies_belong_to_one_patient():
    rng = np.random.default_rng(8)
    labels = np.repeat(np.arange(60) % 3 == 0, 10).astype(int)
    risks = np.repeat(rng.uniform(size=60), 10) * 0.5 + 0.2 * labels
    probabilities = np.stack([1 - risks, risks], 1)
    patients = evaluate(BINARY, labels, probabilities, np.repeat(np.arange(60), 10), None, 100, 0)["auc"]
    rows = evaluate(BINARY, labels, probabilities, None, None, 100, 0)["auc"]
    assert patients["value"] == rows["value"]
    assert patients["high"] - patients["low"] > 2 * (rows["high"] - rows["low"])


def test_evaluate_of_several_classes_takes_the_most_probable_one():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]])
    report = evaluate(MULTI, [0, 1, 2, 1], probabilities, None, threshold=0.5, num_bootstrap=0)
    assert report["recalls"] == {"bcc": 1.0, "mel": 0.5, "nv": 1.0}
    assert report["accuracy"] == 0.75
    assert report["auc"] == {"value": 1.0, "low": None, "high": None}
    np.testing.assert_allclose(risk(probabilities, MULTI), [0.9, 0.6, 0.3, 0.7])


def test_equal_priors_find_the_rare_class_that_calibrated_probabilities_never_favour():
    labels = np.array([2] * 8 + [0, 1])
    probabilities = np.array([[0.02, 0.08, 0.9]] * 8 + [[0.4, 0.1, 0.5], [0.02, 0.45, 0.53]])
    report = evaluate(MULTI, labels, probabilities, None, num_bootstrap=0)
    assert report["balanced_accuracy"]["value"] == pytest.approx(1 / 3)
    assert report["balanced_accuracy_equal_priors"]["value"] == 1.0


def test_evaluate_without_malignant_rows_is_json_with_nulls():
    report = evaluate(MULTI, [2, 2, 2], np.full((3, 3), 1 / 3), ["a", "a", "b"], None, 20, 0)
    json.dumps(report, allow_nan=False)
    assert report["auc"]["value"] is None and report["pauc"]["low"] is None and report["sensitivity"] is None
    assert report["recalls"]["mel"] is None


def test_evaluate_refuses_probabilities_of_another_task():
    with pytest.raises(ValueError, match=r"\(2, 3\); expected \(2, 2\)"):
        evaluate(BINARY, [0, 1], np.full((2, 3), 1 / 3), None)
    with pytest.raises(ValueError, match="labels range from 0 to 2; expected 0 to 1"):
        evaluate(BINARY, [0, 2], np.full((2, 2), 0.5), None)


def test_the_roc_curve_is_scikit_learn_s_and_its_area_is_the_auc():
    rng = np.random.default_rng(4)
    labels, scores = rng.random(300) < 0.2, rng.random(300).round(1)
    false_rates, true_rates = roc_curve(labels, scores)
    expected = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose([false_rates, true_rates], expected[:2])
    assert np.trapezoid(true_rates, false_rates) == pytest.approx(roc_auc(labels, scores))
    with pytest.raises(ValueError, match="0 of 2 labels are malignant"):
        roc_curve([0, 0], [0.1, 0.2])


def test_reliability_puts_as_many_into_each_bin_and_agrees_with_the_calibration_error():
    rng = np.random.default_rng(5)
    risks = rng.random(400) ** 3
    labels = rng.random(400) < risks / 2
    bins = reliability(labels, risks, 8)
    assert [number for number, _, _ in bins] == [50] * 8
    assert [mean for _, mean, _ in bins] == sorted(mean for _, mean, _ in bins)
    gap = sum(number * abs(rate - mean) for number, mean, rate in bins) / 400
    assert gap == pytest.approx(adaptive_ece(labels, risks, 8))
    assert reliability([], [], 8) == [] and len(reliability([0, 1], [0.5, 0.5], 8)) == 1
