"""A risk in counted lesions: those of the gate split that were given nearly the same."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.tested_risks import TestedRisks, log_odds, wilson_interval


def test_the_interval_is_wilson_s():
    # Wilson's own formula for 5 of 100, and the rule of three for none.
    assert wilson_interval(0.05, 100) == pytest.approx((0.0215, 0.1118), abs=1e-4)
    low, high = wilson_interval(0, 300)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.0126, abs=1e-4)
    assert wilson_interval(1.0, 4)[1] == pytest.approx(1)


def test_lesions_with_the_closest_risks_are_counted():
    """Of risks that are right on average, about as many are malignant as the risk says, and the interval holds it."""
    rng = np.random.default_rng(0)
    risks = rng.uniform(0.01, 0.99, 5000)
    tested = TestedRisks(risks, rng.uniform(size=5000) < risks)
    for risk in (0.1, 0.5, 0.9):
        similar = tested.similar(risk, 400)
        assert similar.number == 400 and similar.malignant == pytest.approx(400 * risk, abs=40)
        assert similar.low < risk < similar.high


def test_closeness_is_in_log_odds_so_that_small_risks_are_told_apart():
    risks = np.concatenate([np.full(100, 0.0005), np.full(100, 0.02)])
    tested = TestedRisks(risks, np.repeat([False, True], 100))
    assert (tested.similar(0.001).malignant, tested.similar(0.01).malignant) == (0, 100)


def test_lesions_of_one_risk_count_together_whatever_their_order():
    malignant = np.arange(1000) < 100
    for order in (malignant, malignant[::-1]):
        similar = TestedRisks(np.full(1000, 0.2), order).similar(0.3)
        assert (similar.number, similar.malignant) == (1000, 100)


def test_too_few_tested_lesions_say_nothing_and_those_without_a_risk_do_not_count():
    risks = np.concatenate([np.full(99, 0.1), [np.nan] * 50])
    assert TestedRisks(risks, np.zeros(149, bool)).similar(0.1) is None
    assert TestedRisks(np.append(risks, 0.1), np.zeros(150, bool)).similar(1.0).number == 100


def test_the_risks_themselves_are_there_in_log_odds_without_those_that_are_none():
    tested = TestedRisks(np.array([0.5, np.nan, 0.1, 0.0]), np.array([True, True, False, False]))
    assert (tested.number, tested.malignant) == (3, 1)
    assert tested.logits[1:] == pytest.approx([np.log(0.1 / 0.9), 0.0]) and np.isfinite(tested.logits).all()
    assert 1 / (1 + np.exp(-log_odds(np.array(0.0105)))) == pytest.approx(0.0105)
