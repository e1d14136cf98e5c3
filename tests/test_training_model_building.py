"""What build_bundle may learn from: never the gate split's labels; and what a bundle may carry: no one's id."""

import numpy as np
import pandas as pd
import pytest

from data_pipelines.batch_scoring import QUALITY_COLUMNS, ScoredImages
from data_pipelines.image_dataset import DatasetVersion
from modeling.bundle import load_bundle
from modeling.image_scorer import create_scorer
from modeling.schema import TaskSpec
from training import model_building
from training.config import TrainingConfig
from training.model_building import BuildConfig, build_bundle

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
        if (projection := options.projection) is not None:
            embedding = (embedding - projection[1]) @ projection[0]
        quality = {name: np.full(len(chosen), 0.5, np.float32) for name in QUALITY_COLUMNS}
        return ScoredImages(np.arange(len(chosen)), log_probabilities, embedding, quality, {})

    monkeypatch.setattr(model_building, "score_images", score_images)
    # Exporting takes ten seconds and has tests of its own.
    monkeypatch.setattr(model_building, "export_onnx", lambda scorer, size, path: path.write_bytes(b"onnx"))
    monkeypatch.setattr(model_building, "write_parity", lambda scorer, images, path: path.write_bytes(b"parity"))
    positions = version.training_positions
    return -np.logaddexp(0.0, np.stack([logit[positions], -logit[positions]], axis=1))


@pytest.fixture
def build(tmp_path, without_images):
    scorer = create_scorer("tf_efficientnet_lite0", 2, "none").eval()

    def run(name, version):
        config = BuildConfig.model_validate({"num_bootstrap": 50})
        folder = tmp_path / name
        digest, evaluation = build_bundle(
            folder, version, TrainingConfig(), config, scorer, without_images, "0" * 40, lambda line: None
        )
        return folder, digest, evaluation

    return run


def learnt_files(folder):
    """Everything a context's model is made of, without what was measured of it."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted((folder / "contexts").rglob("*"))
        if file.is_file() and file.name != "metrics.json"
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
        gate = before[context]["gate"]["auc"]["value"]
        assert gate > 0.7
        assert after[context]["gate"]["auc"]["value"] == pytest.approx(1.0 - gate)
        assert after[context]["out_of_fold"] == before[context]["out_of_fold"]


def test_a_training_label_does_change_what_is_served(build, version):
    honest, _, _ = build("honest", version)
    flipped = version.lesions.copy()
    flipped.loc[flipped["fold"] == 0, "label"] = 1 - flipped.loc[flipped["fold"] == 0, "label"]
    other = DatasetVersion(version.path, version.task, version.digest, version.images_path, flipped, version.num_folds)
    changed, _, _ = build("changed", other)
    assert learnt_files(honest) != learnt_files(changed)


def test_a_bundle_verifies_and_carries_nobody_s_id(build, version):
    folder, digest, evaluation = build("bundle", version)
    bundle = load_bundle(str(folder), digest)
    assert bundle.manifest.dataset_digest == version.digest
    assert set(evaluation) == set(version.task.contexts) == {"image_only", "none", "patient"}
    reference = pd.read_parquet(folder / "reference.parquet")
    assert len(reference) == len(version.gate_positions)
    everything = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    everything += reference.to_csv().encode()
    assert b"IP_0" not in everything and b"ISIC_0" not in everything
