"""What is called unseen was not trained on, and what an unseen institution costs is visible."""

from __future__ import annotations

import numpy as np
import pytest

from training.institution_report import institution_names, judged_institutions, leave_one_institution_out


def lesions(seed=0, size=400):
    """Four institutions; at "C" the feature means the opposite, which only a model that saw C can know."""
    rng = np.random.default_rng(seed)
    institutions = np.repeat(np.array(["A", "B", "C", "D"], dtype=object), size)
    malignant = rng.random(4 * size) < 0.2
    feature = np.where(institutions == "C", -1, 1) * malignant + rng.normal(0, 0.5, 4 * size)
    return institutions, malignant, feature


def report(institutions, malignant, feature, seen, calls=None):
    def fit_predict(train, test):
        if calls is not None:
            calls.append((train.copy(), test.copy()))
        means = [feature[train & (malignant == value)].mean() for value in (False, True)]
        return feature[test] * np.sign(means[1] - means[0])

    groups = np.arange(len(malignant)).astype(str)
    folds = np.arange(len(malignant)) % 3
    return leave_one_institution_out(institutions, malignant, seen, groups, folds, fit_predict, 200, 0, lambda _: None)


def test_an_institution_where_things_are_otherwise_stands_out():
    institutions, malignant, feature = lesions()
    seen = np.where(institutions == "C", -1, 1) * feature
    by_name = {row["institution"]: row for row in report(institutions, malignant, feature, seen)}
    assert by_name["C"]["seen"]["auc"] > 0.85 > 0.3 > by_name["C"]["unseen"]["auc"]
    assert by_name["C"]["difference"]["auc"]["high"] < -0.5
    assert by_name["A"]["difference"]["auc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert by_name["A"]["n"] == 400 and by_name["A"]["n_malignant"] == malignant[:400].sum()


def test_a_left_out_institution_trains_nothing():
    institutions, malignant, feature = lesions()
    calls = []
    report(institutions, malignant, feature, feature, calls)
    assert len(calls) == 4
    for (train, test), name in zip(calls, "ABCD", strict=True):
        assert (train == (institutions != name)).all() and (test == (institutions == name)).all()


@pytest.mark.parametrize("changed", [9, 10])
def test_few_lesions_are_not_judged(changed):
    institutions, malignant, _ = lesions()
    at_c = np.flatnonzero(institutions == "C")
    malignant[at_c] = False
    malignant[at_c[:changed]] = True
    assert ("C" in judged_institutions(institutions, malignant, np.arange(1600) % 3)) == (changed == 10)


def test_lesions_without_an_institution_form_none():
    institutions, malignant, _ = lesions()
    institutions[institutions == "B"] = None
    names = institution_names(institutions)
    assert judged_institutions(names, malignant, np.arange(1600) % 3) == ["A", "C", "D"]
    assert (names == "(missing)").sum() == 400


def test_an_institution_without_which_one_fold_is_left_is_not_judged():
    """No model can be cross-fitted on the others, which must not end a run whose networks are trained."""
    institutions, malignant, _ = lesions()
    folds = np.where(institutions == "A", np.arange(1600) % 3, 0)
    assert judged_institutions(institutions, malignant, folds) == ["B", "C", "D"]
