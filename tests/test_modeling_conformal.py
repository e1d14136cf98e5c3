"""The promise of the sets is kept on new lesions, class by class, also for a rare class and a poor model."""

import numpy as np
import pytest

from modeling.conformal import ConformalSets

CLASSES = ["nv", "mel", "df"]
SHARES = [0.8, 0.15, 0.05]


def draw(count, rng, signal=1.0):
    labels = rng.choice(3, count, p=SHARES)
    logits = rng.normal(size=(count, 3)) + signal * np.eye(3)[labels] + np.log(SHARES)
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("signal", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_every_class_is_covered_as_promised_on_new_rows(signal, error):
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        sets = ConformalSets.fit(*draw(400, rng, signal), error)
        report = sets.coverage(*draw(2000, rng, signal), CLASSES)
        covered.append(list(report["coverage"].values()))
    # Exchangeable rows: between 1 - error and 1 - error + 1 / (n + 1), here n = 20 for the rarest class.
    means = np.mean(covered, axis=0)
    assert (means > 1 - error - 0.01).all()
    assert (means < 1 - error + np.array([0.01, 0.025, 0.06])).all()


def test_a_better_model_gives_smaller_sets():
    rng = np.random.default_rng(1)
    sizes = [
        ConformalSets.fit(*draw(2000, rng, signal), 0.1).coverage(*draw(2000, rng, signal), CLASSES)["mean_size"]
        for signal in (0.0, 2.0, 5.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_class_with_too_few_rows_is_never_left_out():
    probabilities, labels = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), np.array([0, 0, 1])
    sets = ConformalSets.fit(probabilities, labels, 0.1)
    assert sets.limits == [0.0, 0.0] and sets.counts == [2, 1]
    assert sets.sets(np.array([[1.0, 0.0]])).all()


def test_a_class_that_is_absent_has_no_coverage_to_report():
    sets = ConformalSets(error=0.1, limits=[0.5, 0.5], counts=[10, 10])
    report = sets.coverage(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0]), ["benign", "malignant"])
    assert report["coverage"] == {"benign": 0.5, "malignant": None}
    assert (report["mean_size"], report["single"], report["empty"]) == (1.0, 1.0, 0.0)


def test_the_exact_rank_is_used():
    # Nine rows and error 0.1: floor(0.1 * 10) = 1, so the smallest probability is the limit.
    probabilities = np.stack([np.linspace(0.1, 0.9, 9), 1 - np.linspace(0.1, 0.9, 9)], axis=1)
    assert ConformalSets.fit(probabilities, np.zeros(9, int), 0.1).limits[0] == pytest.approx(0.1)
    assert ConformalSets.fit(probabilities[:8], np.zeros(8, int), 0.1).limits[0] == 0.0
