"""What build_bundle may learn from: never the gate split's labels; and what a bundle may carry: no one's id."""

import json

import numpy as np
import pandas as pd
import pytest

from data_pipelines.batch_scoring import QUALITY_COLUMNS, ScoredImages
from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.synthetic_lesions import parity_images
from modeling.abstention import AbstentionRule
from modeling.bundle import load_bundle
from modeling.engine_interface import EngineOutput
from modeling.image_scorer import ExportableScorer, create_scorer
from modeling.schema import TaskSpec
from ray_jobs import train_model
from training import model_building
from training.config import BuildConfig, TrainingConfig
from training.model_building import build_bundle

NUM_PATIENTS, LESIONS_EACH, EMBEDDING_DIM = 90, 6, 12


@pytest.fixture
def task():
    return TaskSpec(
        name="spots",
        fold_group="patient_id",
        context_group="patient_id",
        label_column="target",
        classes=["benign", "malignant"],
        malignant=["malignant"],
        columns={"size_mm": {"kind": "numeric"}},
        subgroup_columns=["sex"],
    )


@pytest.fixture
def version(tmp_path, task):
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(NUM_PATIENTS), LESIONS_EACH)
    label = (rng.random(len(patient)) < 0.25).astype(np.int64)
    lesions = pd.DataFrame(
        {
            "id": [f"ISIC_{row:07d}" for row in range(len(patient))],
            "group": [f"IP_{number:07d}" for number in patient],
            "context": [f"IP_{number:07d}" for number in patient],
            "label": label,
            "fold": patient % 4 - 1,
            "offset": 0,
            "size": 1,
            "size_mm": rng.normal(4.0 + label, 1.0),
            "sex": np.where(patient % 3 == 0, "male", "female"),
        }
    )
    return DatasetVersion(tmp_path, task, "d" * 64, "images.hdf5", lesions, 3)


@pytest.fixture
def without_images(monkeypatch, version):
    """Stands for the network and the pictures: the scores are drawn once, from the unflipped labels, and stay."""
    rng = np.random.default_rng(5)
    logit = 1.5 * (version.lesions["label"].to_numpy() - 0.5) + rng.normal(size=len(version.lesions))
    number = {name: row for row, name in enumerate(version.lesions["id"])}

    def score_images(path, rows, onnx_path, input_size, options):
        chosen = np.array([number[name] for name in rows.ids])
        log_probabilities = -np.logaddexp(0.0, np.stack([logit[chosen], -logit[chosen]], axis=1))
        embedding = np.random.default_rng(7).normal(size=(len(number), EMBEDDING_DIM))[chosen].astype(np.float32)
        distance = None if options.distance is None else options.distance(embedding)
        if (projection := options.projection) is not None:
            embedding = (embedding - projection[1]) @ projection[0]
        figures = np.random.default_rng(8).normal(0.5, 0.02, (len(QUALITY_COLUMNS), len(number)))
        quality = dict(zip(QUALITY_COLUMNS, figures[:, chosen], strict=True))
        return ScoredImages(np.arange(len(chosen)), log_probabilities, embedding, quality, {}, distance)

    monkeypatch.setattr(model_building, "score_images", score_images)
    # Exporting takes ten seconds and has tests of its own.
    monkeypatch.setattr(model_building, "export_onnx", lambda scorer, size, path: path.write_bytes(b"onnx"))
    monkeypatch.setattr(model_building, "write_parity", lambda scorer, images, path: path.write_bytes(b"parity"))
    monkeypatch.setattr(model_building, "OnnxRuntimeEngine", MeanColours)
    lesion = parity_images(64, seed=0, count=1)
    monkeypatch.setattr(model_building, "some_pictures", lambda version, positions, number, seed: list(lesion))
    positions = version.training_positions
    return -np.logaddexp(0.0, np.stack([logit[positions], -logit[positions]], axis=1))


class MeanColours:
    """Stands for the exported network where it sees unusable pictures."""

    def __init__(self, path):
        assert path.read_bytes() == b"onnx"

    def run(self, images):
        colours = images.mean(axis=(1, 2)).astype(np.float32)
        return EngineOutput(colours, np.tile(colours, EMBEDDING_DIM // 3))


@pytest.fixture
def build(tmp_path, without_images):
    scorer = ExportableScorer([create_scorer("tf_efficientnet_lite0", 2, "none").eval()])

    def run(name, version):
        config = BuildConfig.model_validate({"num_bootstrap": 50, "ood_pictures": 1})
        folder = tmp_path / name
        digest, results = build_bundle(
            folder, version, TrainingConfig(), config, scorer, without_images, "0" * 40, lambda line: None
        )
        return folder, digest, results

    return run


def learnt_files(folder):
    """Everything the models and the abstention rule are made of, without what was measured of them."""
    rule = json.loads((folder / "abstention.json").read_text())
    assert rule.pop("measured")
    return {
        "abstention": (rule, (folder / "abstention.npz").read_bytes()),
        **{
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted((folder / "contexts").rglob("*"))
            if file.is_file() and file.name != "metrics.json"
        },
    }


def test_the_labels_of_the_gate_split_change_what_is_measured_and_nothing_that_is_served(build, version):
    honest, _, before = build("honest", version)
    flipped = version.lesions.copy()
    flipped.loc[flipped["fold"] == -1, "label"] = 1 - flipped.loc[flipped["fold"] == -1, "label"]
    other = DatasetVersion(version.path, version.task, version.digest, version.images_path, flipped, version.num_folds)
    changed, _, after = build("changed", other)
    assert len(learnt_files(honest)) >= 3
    assert learnt_files(honest) == learnt_files(changed)
    for context in version.task.contexts:
        gate = before.evaluation[context]["gate"]["auc"]["value"]
        assert gate > 0.7
        assert after.evaluation[context]["gate"]["auc"]["value"] == pytest.approx(1.0 - gate)
        assert after.evaluation[context]["out_of_fold"] == before.evaluation[context]["out_of_fold"]


def test_a_training_label_does_change_what_is_served(build, version):
    honest, _, _ = build("honest", version)
    flipped = version.lesions.copy()
    flipped.loc[flipped["fold"] == 0, "label"] = 1 - flipped.loc[flipped["fold"] == 0, "label"]
    other = DatasetVersion(version.path, version.task, version.digest, version.images_path, flipped, version.num_folds)
    changed, _, _ = build("changed", other)
    assert learnt_files(honest) != learnt_files(changed)


def test_a_bundle_verifies_and_carries_nobody_s_id(build, version):
    folder, digest, results = build("bundle", version)
    bundle = load_bundle(str(folder), digest)
    assert bundle.manifest.dataset_digest == version.digest
    assert set(results.evaluation) == set(version.task.contexts) == {"image_only", "none", "patient"}
    # The ids of missed cancers are for the report in house.
    assert all(name.startswith("ISIC_0") for missed in results.missed.values() for name in missed["id"])
    reference = pd.read_parquet(folder / "reference.parquet")
    assert len(reference) == len(version.gate_positions)
    everything = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    everything += reference.to_csv().encode()
    assert b"IP_0" not in everything and b"ISIC_0" not in everything


def test_the_abstention_rule_is_measured_on_the_gate_split_and_on_unusable_pictures(
    build, version, tmp_path, monkeypatch
):
    folder, digest, results = build("bundle", version)
    assert load_bundle(str(folder), digest).manifest.files.keys() >= {"abstention.json", "abstention.npz"}
    rule = AbstentionRule.load(folder)
    assert rule.num_rows == len(version.training_positions)
    gate = rule.measured["gate"]
    assert gate["all"]["n"] == len(version.gate_positions) == gate["malignant"]["n"] + gate["benign"]["n"]
    assert gate["malignant"]["n"] == version.lesions["label"].iloc[version.gate_positions].sum()
    assert gate["all"]["share"] < 0.08
    kinds = {row["kind"]: row for row in rule.measured["kinds"]}
    assert kinds["lens_cap"]["share"] == kinds["darkened"]["share"] == 1.0
    card = (folder / "model_card.md").read_text()
    assert "## Pictures it does not score" in card and "spoilt lesions, 7 kinds held out" in card
    drawn = []
    for name in ("plot_evaluation", "plot_clinical"):
        monkeypatch.setattr(train_model, name, lambda *arguments: None)
    monkeypatch.setattr(train_model, "plot_abstention", lambda path, report, title: drawn.append((path.name, report)))
    train_model.write_report(tmp_path / "report", folder, version, results)
    assert json.loads((tmp_path / "report" / "abstention.json").read_text()) == rule.measured
    assert drawn == [("abstention.png", results.ood)] and not list(folder.rglob("*.png"))
    metrics = train_model.abstention_metrics(rule.measured)
    assert metrics["abstention.gate.all"] == gate["all"]["share"] and 0.5 < metrics["abstention.non_lesion"] <= 1


def test_models_are_compared_in_pairs_with_metadata_alone_and_with_each_other(build, version):
    lesions = version.lesions.assign(clinic=np.where(np.arange(len(version.lesions)) % 4 == 0, "North", "South"))
    task = version.task.model_copy(update={"institution_column": "clinic"})
    version = DatasetVersion(version.path, task, version.digest, version.images_path, lesions, version.num_folds)
    folder, _, results = build("bundle", version)
    assert [row["institution"] for row in results.comparison["institutions"]] == ["North", "South"]
    assert sum(row["n"] for row in results.comparison["institutions"]) == len(version.training_positions)
    pairs = [(row["model"], row["against"]) for row in results.comparison["gains"]["gate"]]
    assert pairs[0] == ("image_only", "tabular_only") and ("patient", "image_only") in pairs and len(pairs) == 6
    tabular = results.comparison["tabular_only"]["gate"]["auc"]["value"]
    for row in results.comparison["gains"]["gate"]:
        own = results.evaluation[row["model"]]["gate"]["auc"]["value"]
        against = results.evaluation.get(row["against"], results.comparison["tabular_only"])["gate"]["auc"]["value"]
        assert row["auc"]["value"] == pytest.approx(own - against)
        assert row["auc"]["low"] <= row["auc"]["value"] <= row["auc"]["high"]
    assert tabular > 0.5
    card = (folder / "model_card.md").read_text()
    assert "Institutions the model has not seen, `patient`" in card and "| North |" in card
    assert "Operating points of `patient`" in card and "prediction sets for 90%" in card


def test_the_clinical_tables_agree_with_the_probabilities(build, version):
    _, _, results = build("bundle", version)
    held_out = version.lesions.iloc[version.gate_positions]
    malignant = held_out["label"].to_numpy() == 1
    risks = results.gate_probabilities["patient"][:, 1]
    clinical = results.evaluation["patient"]["clinical"]
    for point in clinical["operating_points"]:
        acted = risks >= point["threshold"]
        assert point["measured_sensitivity"] == pytest.approx(acted[malignant].mean())
        assert point["needed_to_triage"] == pytest.approx(acted.sum() / (acted & malignant).sum())
        assert 0 < point["sensitivity_low"] < point["sensitivity"]
        for name in ("measured_sensitivity", "measured_specificity"):
            assert point[f"{name}_low"] <= point[name] <= point[f"{name}_high"]
    operating = next(p for p in clinical["operating_points"] if p["sensitivity"] == 0.95)
    assert len(results.missed["patient"]) == (malignant & (risks < operating["threshold"])).sum()
    # The same decisions as in the metrics.
    for name, row, position in zip(("benign", "malignant"), clinical["confusion"], (0, 1), strict=True):
        recall = results.evaluation["patient"]["gate"]["recalls"][name]
        assert row[position] / sum(row) == pytest.approx(recall)
    assert sum(map(sum, clinical["confusion"])) == len(held_out)
    by_column = {}
    for row in clinical["subgroups"]:
        by_column[row["column"]] = by_column.get(row["column"], 0) + row["n"]
    assert by_column and set(by_column.values()) == {len(held_out)}
