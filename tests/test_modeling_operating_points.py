"""Thresholds reach what they were chosen for, and say how far that holds on other patients."""

import json
import math

import numpy as np
import pytest

from modeling.operating_points import choose_thresholds


@pytest.mark.parametrize("num_positives", [1, 3, 20, 100])
def test_thresholds_are_the_highest_that_reach_their_sensitivity(num_positives):
    rng = np.random.default_rng(num_positives)
    labels = np.repeat([1, 0], [num_positives, 500])
    risks = np.round(rng.random(len(labels)) + 0.3 * labels, 2)  # with ties
    thresholds = choose_thresholds(labels, risks, (0.8, 0.9, 0.95, 1.0), 0.9)
    assert thresholds.threshold == thresholds.at(0.9) and thresholds.operating_sensitivity == 0.9
    for point in thresholds.points:
        assert np.mean(risks[labels == 1] >= point.threshold) >= point.sensitivity
        higher = np.nextafter(point.threshold, np.inf)
        assert np.mean(risks[labels == 1] >= higher) < point.sensitivity
        assert point.specificity == np.mean(risks[labels == 0] < point.threshold)


def test_the_lower_bound_holds_where_cancers_of_a_patient_are_alike():
    """Of 40 patients' cancers, alike or not, at most one threshold in 20 finds fewer on new patients than its bound."""
    rng = np.random.default_rng(0)

    def misses(each, grouped):
        found_fewer = 0
        for _ in range(400):
            patients = np.repeat(np.arange(40), each)
            risks = 0.9 * rng.normal(size=40)[patients] + 0.44 * rng.normal(size=len(patients))
            labels = np.repeat([1, 0], [len(risks), 10])
            groups = np.concatenate([patients, 40 + np.arange(10)]) if grouped else None
            points = choose_thresholds(labels, np.append(risks, np.zeros(10)), (0.9,), 0.9, groups).points
            point = next(point for point in points if point.sensitivity == 0.9)
            # Risks of new patients are standard normal.
            found_fewer += 0.5 * math.erfc(point.threshold / math.sqrt(2)) < point.sensitivity_low
        return found_fewer / 400

    assert misses(1, True) == pytest.approx(0.05, abs=0.03)
    assert misses(10, True) < 0.06 < 0.1 < misses(10, False)


def test_the_lower_bound_of_independent_cancers_is_clopper_and_pearson_s():
    labels, risks = np.repeat([1, 0], [20, 30]), np.concatenate([np.linspace(0.5, 1, 20), np.zeros(30)])
    point = next(p for p in choose_thresholds(labels, risks, (0.9,), 0.9).points if p.sensitivity == 0.9)
    # With this sensitivity 18 or more of 20 are found in 5 of 100 draws.
    low = point.sensitivity_low
    tail = sum(math.comb(20, k) * low**k * (1 - low) ** (20 - k) for k in range(18, 21))
    assert tail == pytest.approx(0.05)
    assert (
        choose_thresholds(labels, risks, (0.9,), 0.9, np.arange(50)).points
        == choose_thresholds(labels, risks, (0.9,), 0.9).points
    )


def test_bands_lie_between_the_thresholds_for_95_and_80_percent_whatever_was_asked_for():
    labels, risks = np.repeat([1, 0], 100), np.concatenate([np.linspace(0.01, 1, 100), np.zeros(100)])
    thresholds = choose_thresholds(labels, risks, (0.9,), 0.99)
    moderate, high = thresholds.at(0.95), thresholds.at(0.8)
    assert moderate == pytest.approx(0.06) and high == pytest.approx(0.21)
    assert [thresholds.band(value) for value in (0.0, moderate - 1e-9, moderate, high - 1e-9, high, 1.0)] == [
        *("low", "low", "moderate", "moderate", "high", "high")
    ]
    assert type(thresholds)(**json.loads(thresholds.model_dump_json())).band(high) == "high"


def test_thresholds_need_both_kinds_of_lesions():
    with pytest.raises(ValueError, match="0 of 5 lesions are malignant"):
        choose_thresholds(np.zeros(5), np.linspace(0, 1, 5), (0.9,), 0.9)
    with pytest.raises(ValueError, match="sensitivity is 1.5"):
        choose_thresholds(np.array([0, 1]), np.array([0.1, 0.2]), (1.5,), 0.9)
    with pytest.raises(ValueError, match="no threshold for sensitivity 0.5"):
        choose_thresholds(np.array([0, 1]), np.array([0.1, 0.2]), (0.9,), 0.9).at(0.5)
