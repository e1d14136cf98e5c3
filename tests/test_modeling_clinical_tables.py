"""Tables for clinicians, each against a count that can be done by hand."""

import numpy as np
import pytest

from modeling.clinical_tables import (
    age_bands,
    confusion_matrix,
    needed_to_triage,
    net_benefit,
    skin_tones,
    subgroup_table,
    top_retrieval,
)

MALIGNANT = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], bool)
RISKS = np.array([0.9, 0.04, 0.5, 0.03, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])


def test_net_benefit_weighs_false_alarms_by_the_odds_of_the_threshold():
    (row,) = net_benefit(MALIGNANT, RISKS, [0.03])
    assert row["model"] == pytest.approx(0.2 - 0.2 * 0.03 / 0.97)
    assert row["treat_all"] == pytest.approx(0.2 - 0.8 * 0.03 / 0.97)
    (high,) = net_benefit(MALIGNANT, RISKS, [0.5])
    assert high["model"] == pytest.approx(0.1 - 0.1) and high["treat_all"] == pytest.approx(0.2 - 0.8)


def test_a_decision_curve_reaches_the_share_of_cancers():
    rare = np.arange(1000) < 10
    assert max(row["threshold"] for row in net_benefit(rare, rare.astype(float))) == 0.05
    assert max(row["threshold"] for row in net_benefit(MALIGNANT, RISKS)) == 0.5 > MALIGNANT.mean()


def test_net_benefit_of_a_perfect_model_is_the_prevalence_everywhere():
    assert {row["model"] for row in net_benefit(MALIGNANT, MALIGNANT.astype(float))} == {0.2}


def test_a_prevalence_weighs_lesions_as_if_they_were_so_many():
    """Nine of ten benign lesions more, all with the risks of those there are, say the same as their prevalence."""
    malignant, risks = MALIGNANT, RISKS
    more = np.concatenate([risks, *[risks[~malignant]] * 9])
    labels = np.concatenate([malignant, np.zeros(9 * (~malignant).sum(), bool)])
    weighed = net_benefit(malignant, risks, [0.02, 0.3], labels.mean())
    for row, expected in zip(weighed, net_benefit(labels, more, [0.02, 0.3]), strict=True):
        assert row == pytest.approx(expected)
    assert needed_to_triage(malignant, risks, 0.03, labels.mean()) == pytest.approx(
        needed_to_triage(labels, more, 0.03)
    )
    assert net_benefit(np.ones(3, bool), np.ones(3), prevalence=0.1) == []
    assert needed_to_triage(np.ones(3, bool), np.ones(3), 0.5, 0.1) is None


def test_needed_to_triage_counts_lesions_per_cancer_found():
    assert needed_to_triage(MALIGNANT, RISKS, 0.03) == 2.0
    assert needed_to_triage(MALIGNANT, RISKS, 0.6) == 1.0
    assert needed_to_triage(MALIGNANT, RISKS, 0.95) is None


def test_top_retrieval_asks_only_patients_with_more_lesions_than_shown_and_counts_ties_against_the_model():
    patients = ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    malignant = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0], bool)
    risks = np.array([0.9, 0.1, 0.1, 0.1, 0.2, 0.5, 0.2, 0.1, 0.0, 0.9])
    # a: first. b: one above and one tie, so third of two shown. c has no more lesions than are shown.
    assert top_retrieval(malignant, risks, patients, 2) == {"count": 2, "n_malignant": 2, "found": 1, "share": 0.5}
    shuffled = np.random.default_rng(0).permutation(10)
    again = top_retrieval(malignant[shuffled], risks[shuffled], [patients[i] for i in shuffled], 2)
    assert again["found"] == 1
    assert top_retrieval(malignant, risks, patients, 15)["share"] is None


def test_age_bands_and_skin_tones_take_their_edges_from_the_literature():
    assert age_bands([0, 29, 30, 44.9, 45, 75, 90, np.nan]) == [
        "under 30", "under 30", "30-44", "30-44", "45-59", "75 and over", "75 and over", None,
    ]  # fmt: skip
    # 45 degrees is light, 60 very light, 20 tan, -40 dark.
    assert skin_tones([60.0, 50 + 10 * 3**0.5, 50 + 10 * np.tan(np.radians(20)), 40.0], [10.0, 10.0, 10.0, 11.9]) == [
        "light", "very light", "tan", "dark",
    ]  # fmt: skip
    assert skin_tones([np.nan], [10.0]) == [None]


def test_a_subgroup_with_few_cancers_is_counted_but_not_judged():
    rng = np.random.default_rng(0)
    malignant = np.array([True] * 30 + [False] * 170)
    risks = np.where(malignant, 0.7, 0.2) + 0.2 * rng.random(200)
    sex = np.array(["female"] * 25 + ["male"] * 5 + ["female"] * 60 + ["male"] * 108 + [None] * 2, dtype=object)
    table = {row["value"]: row for row in subgroup_table(malignant, risks, 0.5, {"sex": sex})}
    assert list(table) == ["male", "female", "(missing)"]
    assert (table["female"]["n"], table["female"]["n_malignant"]) == (85, 25)
    assert table["female"]["auc"] == pytest.approx(1.0) and table["female"]["sensitivity"] == 1.0
    assert table["male"]["n_malignant"] == 5 and table["male"]["sensitivity"] is None and table["male"]["auc"] is None
    assert table["male"]["specificity"] == 1.0
    assert table["(missing)"]["n"] == 2 and table["(missing)"]["specificity"] is None


def test_a_subgroup_of_cancers_alone_has_no_specificity():
    (row,) = subgroup_table(np.ones(12, bool), np.linspace(0, 1, 12), 0.5, {"site": ["torso"] * 12})
    assert row["sensitivity"] == 0.5 and row["specificity"] is None and row["auc"] is None


def test_confusion_counts_true_by_predicted():
    assert confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
