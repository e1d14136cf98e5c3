"""What train_model writes of data that cannot show everything: files that parse, pictures without made-up curves."""

import json
import warnings

import numpy as np
import pytest

from data_pipelines.image_dataset import DatasetVersion
from modeling.bundle import load_bundle
from ray_jobs.train_model import flat_metrics, out_of_fold_table, write_report
from tests.small_population import BINARY, FOUR, GATE, lesions
from training.config import BuildConfig, TrainingConfig
from training.model_building import build_bundle


def without_malignant_gate(table):
    table.loc[table["fold"] == GATE, "label"] = 0


def without_benign_gate(table):
    table.loc[table["fold"] == GATE, "label"] = 1


def without_metadata(table):
    table["size_mm"], table["age"], table["site"] = np.nan, np.nan, None


def without_positives_in_a_fold(table):
    table.loc[table["fold"] == 1, "label"] = 0


def without_a_class_in_training(table):
    table.loc[(table["fold"] >= 0) & (table["label"] == 1), "label"] = 0


def of_one_gate_lesion(table):
    table.drop(index=table.index[table["fold"] == GATE][1:], inplace=True)


CASES = [
    pytest.param(BINARY, without_malignant_gate),
    *(
        pytest.param(task, spoil, marks=pytest.mark.slow)
        for task, spoil in (
            (BINARY, without_benign_gate),
            (BINARY, without_metadata),
            (BINARY, without_positives_in_a_fold),
            (FOUR, without_a_class_in_training),
            (BINARY, of_one_gate_lesion),
        )
    ),
]


@pytest.mark.parametrize(("task", "spoil"), CASES)
def test_every_report_is_written_without_nan_or_warning(tmp_path, task, spoil):
    table = lesions(task)
    spoil(table)
    version = DatasetVersion(tmp_path, task, "d" * 64, None, table.reset_index(drop=True), 3)
    config = BuildConfig.model_validate(
        {"num_bootstrap": 50, "fusion": {"boosters": [{"num_bags": 1}], "num_boost_round": 20}}
    )
    with warnings.catch_warnings():
        # A curve of one class only is a warning of scikit-learn's, and a line that means nothing.
        warnings.simplefilter("error")
        bundle = tmp_path / "bundle"
        digest, results = build_bundle(
            bundle, version, TrainingConfig(), config, None, None, "0" * 40, lambda line: None
        )
        write_report(tmp_path / "report", bundle, version, results)
    assert load_bundle(str(bundle), digest).contexts.keys() == {"none", "patient"}

    def refuse(constant):
        raise AssertionError(f"{constant} in {file}")

    files = [*tmp_path.rglob("*.json")]
    assert {"evaluation.json", "comparison.json", "environment.json", "metrics.json"} <= {file.name for file in files}
    for file in files:
        json.loads(file.read_text(), parse_constant=refuse)
    assert np.isfinite(list(flat_metrics(results.evaluation).values())).all()
    for name in ("evaluation.png", "clinical.png"):
        assert (tmp_path / "report" / name).stat().st_size > 5_000
    notes, card = results.evaluation["patient"]["notes"], (bundle / "model_card.md").read_text()
    assert notes and all(card.count(f"- {note}") == 1 for note in notes) or spoil is of_one_gate_lesion


def test_out_of_fold_scores_of_several_classes_add_up_to_the_risk(tmp_path):
    from training.context_models import ContextResults

    table = lesions(FOUR)
    version = DatasetVersion(tmp_path, FOUR, "d" * 64, None, table, 3)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), len(version.training_positions))
    written = out_of_fold_table(version, ContextResults(out_of_fold={"none": probabilities}))
    assert list(written["label"]) == [FOUR.classes[label] for label in table.query("fold >= 0")["label"]]
    np.testing.assert_allclose(written["none_bcc"] + written["none_mel"], written["risk_none"])
    assert list(written.columns) == ["id", "fold", "label", "risk_none", *(f"none_{name}" for name in FOUR.classes)]
