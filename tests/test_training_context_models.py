"""Data that cannot teach or show something: every case ends in a defined figure or null and a sentence that says why.

The whole path from a data set without pictures to report, model card and JSON; pictures add nothing to these cases.
"""

import json
import time

import numpy as np
import pandas as pd
import pytest

from data_pipelines.image_dataset import DatasetVersion
from modeling.context_model import ContextModel
from modeling.metadata_fusion import BoosterConfig, FusionConfig
from modeling.model_card import render_model_card
from tests.small_population import BINARY, EACH, FOUR, GATE, PATIENTS, lesions
from training.config import BuildConfig, TrainingConfig
from training.context_models import fit_contexts
from training.evaluation_notes import check_trainable

CONFIG = BuildConfig(fusion=FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=30), num_bootstrap=50)


class Fitted:
    """A data set's models, and everything that is written about them."""

    def __init__(self, folder, table, task=BINARY):
        self.version = DatasetVersion(folder, task, "d" * 64, None, table, 3)
        check_trainable(self.version)
        self.said = []
        training = TrainingConfig()
        self.results = fit_contexts(folder, self.version, training, CONFIG, None, None, self.said.append)
        self.evaluation = self.results.evaluation
        json.dumps([self.evaluation, self.results.comparison], allow_nan=False)
        self.notes = self.evaluation["patient"]["notes"]
        for context, report in self.evaluation.items():
            probabilities = [self.results.gate_probabilities[context], self.results.out_of_fold[context]]
            for values in probabilities:
                assert np.isfinite(values).all() and (values > 0).all(), context
                np.testing.assert_allclose(values.sum(axis=1), 1.0)
            # What null stands for is said in a sentence.
            assert report["gate"]["auc"]["value"] is not None or report["notes"]
        self.card = render_model_card(
            {
                "name": task.name,
                "task": task.model_dump(),
                "input_size": 0,
                "backbone": "none",
                "embedding_dim": 0,
                "modalities": ["metadata"],
                "dataset_digest": self.version.digest,
                "git_commit": "c" * 40,
                "contexts": list(self.evaluation),
                "sampling_prior": [1 / task.num_classes] * task.num_classes,
                "population_prior": [1 / task.num_classes] * task.num_classes,
            },
            {context: report["gate"] for context, report in self.evaluation.items()},
            {context: report["clinical"] for context, report in self.evaluation.items()},
            notes=self.notes,
        )
        assert all(f"- {note}" in self.card and f"note: {note}" in self.said for note in self.notes)

    def aucs(self, context="patient"):
        """AUC of the gate split and of each fold."""
        report = self.evaluation[context]
        return [report["gate"]["auc"]["value"], *(fold["auc"]["value"] for fold in report["per_fold"])]


@pytest.fixture
def fit(tmp_path):
    return lambda table, task=BINARY: Fitted(tmp_path, table, task)


def test_ordinary_data_need_no_note(fit):
    ordinary = fit(lesions())
    assert ordinary.notes == [] and all(auc > 0.65 for auc in ordinary.aucs())


def test_a_fold_without_positives_has_null_metrics_and_the_others_are_unharmed(fit):
    table = lesions()
    table.loc[table["fold"] == 1, "label"] = 0
    fitted = fit(table)
    gate, first, empty, last = fitted.aucs()
    assert empty is None and min(gate, first, last) > 0.65
    assert fitted.evaluation["patient"]["per_fold"][1]["sensitivity"] is None
    assert fitted.evaluation["patient"]["out_of_fold"]["auc"]["value"] > 0.65
    assert fitted.notes == ["Fold 1 (90 lesions) holds no malignant lesion: its AUC and pAUC are null."]


def test_what_was_fitted_on_the_training_rows_is_measured_on_the_gate_split_alone(fit):
    report = fit(lesions()).evaluation["patient"]
    for name in ("sensitivity", "specificity", "ece", "calibration_slope", "calibration_intercept"):
        assert report["gate"][name] is not None
        assert {part[name] for part in (report["out_of_fold"], *report["per_fold"])} == {None}
    assert report["gate"]["intervals"]["sensitivity"]["low"] < report["gate"]["sensitivity"]
    assert report["out_of_fold"]["intervals"]["sensitivity"]["low"] is None


def test_risks_are_for_the_prevalence_asked_for(tmp_path):
    """Patients of the clinic that the model is for have fewer cancers than the data."""
    table = lesions(patients=400)
    version = DatasetVersion(tmp_path, BINARY, "d" * 64, None, table, 3)
    results = {}
    for prevalence in (None, 0.02):
        config = CONFIG.model_copy(update={"prevalence": prevalence})
        results[prevalence] = fit_contexts(tmp_path, version, TrainingConfig(), config, None, None, lambda _: None)
    gate = table[table["fold"] == GATE]
    malignant = gate["label"].to_numpy() == 1
    risks = results[0.02].gate_probabilities["patient"][:, 1]
    weights = np.where(malignant, 0.02 / malignant.sum(), 0.98 / (~malignant).sum())
    assert (weights * risks).sum() == pytest.approx(0.02, rel=0.15)
    before, after = (results[prevalence].evaluation["patient"] for prevalence in (None, 0.02))
    assert after["gate"]["auc"]["value"] == pytest.approx(before["gate"]["auc"]["value"])
    assert after["gate"]["sensitivity"] == before["gate"]["sensitivity"]
    assert after["gate"]["ece"] is None and any("0.02 malignant lesions in 1" in note for note in after["notes"])
    point = {row["sensitivity"]: row["needed_to_triage"] for row in after["clinical"]["operating_points"]}
    assert point[0.95] > 10


def test_cancers_of_a_few_patients_have_figures_but_no_intervals(fit):
    table = lesions()
    patients = table.loc[table["fold"] == GATE, "group"].unique()
    table.loc[(table["fold"] == GATE) & ~table["group"].isin(patients[:9]), "label"] = 0
    table.loc[table["group"].isin(patients[:9]) & (table.index % EACH == 0), "label"] = 1
    fitted = fit(table)
    gate = fitted.evaluation["patient"]["gate"]
    assert gate["auc"]["value"] > 0.5 and gate["auc"]["low"] is gate["auc"]["high"] is None
    assert gate["intervals"]["specificity"] == {"low": None, "high": None} and gate["specificity"] is not None
    assert fitted.notes == [
        "The gate split's malignant lesions are of 9 groups by patient_id, the benign ones of 15: with fewer than 10 "
        "of either, intervals are null."
    ]
    gain = fitted.results.comparison["gains"]["gate"][0]
    assert gain["auc"]["value"] is not None and gain["auc"]["low"] is None


@pytest.mark.parametrize(
    ("label", "kind", "measure"),
    [(0, "malignant", "sensitivity"), pytest.param(1, "benign", "specificity", marks=pytest.mark.slow)],
)
def test_a_gate_split_of_one_class_measures_nothing_and_says_so(fit, label, kind, measure):
    table = lesions()
    table.loc[table["fold"] == GATE, "label"] = label
    fitted = fit(table)
    gate = fitted.evaluation["patient"]["gate"]
    assert gate["auc"] == gate["pauc"] == {"value": None, "low": None, "high": None} and gate[measure] is None
    assert fitted.notes[0].startswith(f"The gate split (90 lesions) holds no {kind} lesion")
    assert "| AUC | not measurable | not measurable |" in fitted.card
    gain = fitted.results.comparison["gains"]["gate"][0]
    assert gain["auc"] == gain["pauc"] == {"value": None, "low": None, "high": None}


def test_positives_of_one_fold_alone_give_a_flat_model_not_a_made_up_one(fit):
    """No fold's positives are scored by a model that saw another's: nothing was shown to hold, so nothing is used."""
    table = lesions()
    table.loc[table["fold"] > 0, "label"] = 0
    fitted = fit(table)
    assert fitted.aucs() == [0.5, 0.5, None, None]
    assert [note[:6] for note in fitted.notes] == ["Fold 1", "Fold 2"]
    risks = fitted.results.gate_probabilities["patient"][:, 1]
    share = fitted.version.lesions.query("fold >= 0")["label"].mean()
    np.testing.assert_allclose(risks, share, rtol=0.1)


def test_a_class_absent_from_a_fold_keeps_a_probability_there(fit):
    table = lesions(FOUR)
    table.loc[(table["fold"] == 1) & (table["label"] == 1), "label"] = 0
    fitted = fit(table, FOUR)
    fold = fitted.evaluation["patient"]["per_fold"][1]
    assert fold["recalls"]["mel"] is None and fold["recalls"]["bcc"] is not None and fold["auc"]["value"] > 0.65
    train = fitted.version.lesions.query("fold >= 0")
    mel = fitted.results.out_of_fold["patient"][(train["fold"] == 1).to_numpy(), 1]
    assert 0.3 < mel.mean() / (train["label"] == 1).mean() < 2


@pytest.mark.parametrize("absent", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_class_that_only_the_gate_split_holds_is_improbable_but_never_impossible(fit, absent, tmp_path):
    table = lesions(FOUR)
    table.loc[(table["fold"] != GATE) & (table["label"] == absent), "label"] = absent - 1
    fitted = fit(table, FOUR)
    name = FOUR.classes[absent]
    for context in FOUR.tabular_contexts:
        values = fitted.results.gate_probabilities[context][:, absent]
        assert (values > 0).all() and (values < 1e-4).all()
        assert fitted.evaluation[context]["gate"]["recalls"][name] == 0.0
        assert fitted.evaluation[context]["clinical"]["conformal"]["coverage"][name] == 1.0
    assert fitted.notes == [
        f"No training lesion is of class {name}: the model cannot recognise it; its probability is near 0."
    ]
    # The model that is served answers the same.
    gate = fitted.version.lesions.query("fold == -1")
    loaded = ContextModel.load(tmp_path / "contexts" / "none", FOUR)
    served = loaded.predict(None, {name: gate[name].to_list() for name in FOUR.columns})
    np.testing.assert_allclose(served, fitted.results.gate_probabilities["none"])


def test_constant_columns_change_no_score_and_are_named(fit, tmp_path):
    table = lesions()
    table["age"], table["site"] = 50.0, "arm"
    constant = fit(table)
    assert constant.notes == ["Columns with one value in all training lesions tell nothing: age, site."]
    assert min(constant.aucs("none")) > 0.65
    # Another constant is the same data: nothing was learnt of it.
    table["age"], table["site"] = -3.0, "leg"
    other = fit(table)
    for context in BINARY.tabular_contexts:
        np.testing.assert_allclose(
            other.results.gate_probabilities[context], constant.results.gate_probabilities[context], atol=1e-9
        )


def test_an_empty_column_changes_no_score_and_is_named(fit):
    table = lesions()
    table["age"] = np.nan
    fitted = fit(table)
    assert fitted.notes == ["Columns without a value in any training lesion tell nothing: age."]
    assert min(fitted.aucs("none")) > 0.65


@pytest.mark.parametrize(
    "values",
    [
        {"size_mm": np.nan, "age": np.nan, "site": None},
        pytest.param({"size_mm": 3.0, "age": 50.0}, marks=pytest.mark.slow),
    ],
)
def test_metadata_that_say_nothing_give_everyone_the_prevalence(fit, values):
    table = lesions().assign(**({"site": "arm"} | values))
    fitted = fit(table)
    share = table.query("fold >= 0")["label"].mean()
    for context in BINARY.tabular_contexts:
        np.testing.assert_allclose(fitted.results.gate_probabilities[context][:, 1], share, rtol=0.05)
    assert fitted.aucs() == [0.5] * 4 and "size_mm, age, site" in fitted.notes[0]
    assert fitted.evaluation["none"]["gate"]["pauc"]["value"] == pytest.approx(0.02)


def test_metadata_missing_only_when_scored_give_a_middling_risk(fit, tmp_path):
    """Nothing known is not reassuring: the risk stays near the prevalence, far from that of a small lesion."""
    fitted = fit(lesions())
    share = fitted.version.lesions.query("fold >= 0")["label"].mean()
    nothing = {"size_mm": [np.nan] * 3, "age": [None] * 3, "site": ["", None, np.nan]}
    for context in BINARY.tabular_contexts:
        model = ContextModel.load(tmp_path / "contexts" / context, BINARY)
        groups = ["a", "a", "b"] if context == "patient" else None
        risks = model.predict(None, nothing, groups)[:, 1]
        assert 0.4 * share < risks.min() <= risks.max() < 2.5 * share
        known = model.predict(None, nothing | {"size_mm": [1.0, 9.0, 4.0]}, groups)[:, 1]
        assert known[0] < 0.7 * risks[0] and known[1] > 1.5 * risks[1]


def test_one_lesion_per_patient_makes_the_patient_context_equal_the_lesion_s_own(fit):
    fitted = fit(lesions(patients=PATIENTS * EACH, each=1))
    none, patient = (fitted.results.gate_probabilities[name] for name in ("none", "patient"))
    # Ranks of one half and z-scores of zero offer no split; only the features drawn for each tree differ.
    assert np.corrcoef(none[:, 1], patient[:, 1])[0, 1] > 0.98
    assert fitted.aucs("patient")[0] == pytest.approx(fitted.aucs("none")[0], abs=0.03)
    assert fitted.notes == [
        "Every patient has one training lesion: comparing it with the patient's others tells nothing."
    ]


def test_a_patient_of_a_thousand_lesions_is_scored_with_the_rest(fit, tmp_path):
    large = lesions(patients=1, each=1000, first=900).assign(fold=0)
    fitted = fit(pd.concat([lesions(), large], ignore_index=True))
    assert fitted.notes == [] and min(fitted.aucs()) > 0.65
    model = ContextModel.load(tmp_path / "contexts" / "patient", BINARY)
    columns = {name: large[name].to_numpy() for name in BINARY.columns}
    together = model.predict(None, columns, large["context"].to_numpy(str))
    order = np.random.default_rng(0).permutation(1000)
    shuffled = {name: values[order] for name, values in columns.items()}
    np.testing.assert_allclose(model.predict(None, shuffled, ["x"] * 1000), together[order], atol=1e-9)


@pytest.mark.slow
def test_features_of_a_patient_take_time_in_proportion_to_the_lesions():
    """Comparing each with each would take a hundred times as long for ten times the lesions."""
    from modeling.metadata_features import FeatureSpec

    table = lesions(patients=1, each=40_000)
    spec = FeatureSpec.fit("patient", BINARY, table, has_image=False)

    def seconds(count):
        part = {name: table[name].to_numpy()[:count] for name in BINARY.columns}
        best = np.inf
        for _ in range(3):
            started = time.process_time()
            spec.build(part, None, ["p"] * count)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(40_000) < 30 * seconds(4_000)
