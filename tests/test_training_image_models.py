"""Folds and refit of one run: every row scored by the network that did not see it, alone or two at a time."""

import threading

import numpy as np
import pandas as pd
import pytest

from data_pipelines.image_dataset import DatasetVersion
from modeling.schema import TaskSpec
from training import image_models
from training.config import TrainingConfig
from training.image_models import RunFolder, train_image_models
from training.trainer import TrainedImageModel

NUM_FOLDS = 3


@pytest.fixture
def version(tmp_path):
    task = TaskSpec(
        name="spots",
        fold_group="patient_id",
        label_column="target",
        classes=["benign", "malignant"],
        malignant=["malignant"],
    )
    folds = [0, 2, -1, 1, 1, 0, -1, 2, 2, 0, 1]
    labels = [row % 3 == 0 for row in range(len(folds))]
    lesions = pd.DataFrame({"id": [f"I{row}" for row in range(len(folds))], "fold": folds, "label": np.int64(labels)})
    return DatasetVersion(tmp_path, task, "digest", "images.hdf5", lesions, NUM_FOLDS)


class Trainings:
    """Stands for Ray Train: "trains" a network whose score of a row names the row and the fold it was held out in."""

    def __init__(self, monkeypatch, folder, version, together, failing=None):
        self.folder, self.version, self.failing = folder, version, failing
        self.begun, self.running, self.most = [], 0, 0
        self.lock = threading.Lock()
        # The first `together` trainings end only after all of them have begun.
        self.first = threading.Barrier(together)
        monkeypatch.setattr(image_models, "build_trainer", lambda config, version, fold, path, name: (name, fold))
        monkeypatch.setattr(image_models, "fit", self.fit)

    def fit(self, trainer):
        name, fold = trainer
        with self.lock:
            number = len(self.begun)
            self.begun.append(name)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if number < self.first.parties:
                self.first.wait(timeout=30)
            if name == self.failing:
                raise RuntimeError(f"{name} diverged")
            checkpoint = self.folder / f"checkpoint_{name}"
            checkpoint.mkdir()
            if fold is not None:
                positions = self.version.positions([fold])
                score = (10.0 * positions + fold)[::-1]
                rows = np.arange(len(positions))[::-1]
                labels = self.version.lesions["label"].to_numpy()[positions][::-1]
                table = pd.DataFrame({"row": rows, "label": labels, "lp_benign": score, "lp_malignant": -score})
                # Two workers' shares; the first one's metrics are what Ray Train reports.
                for rank in (0, 1):
                    table[table["row"] % 2 == rank].to_parquet(checkpoint / f"predictions_{rank}.parquet")
            return TrainedImageModel(checkpoint, {"auc": 0.5 if fold is None else fold / 10})
        finally:
            with self.lock:
                self.running -= 1


@pytest.mark.parametrize("max_concurrent", [1, 2])
def test_every_row_has_the_score_of_the_network_that_did_not_see_it(tmp_path, monkeypatch, version, max_concurrent):
    trainings = Trainings(monkeypatch, tmp_path, version, max_concurrent)
    folder = RunFolder(tmp_path / "run", TrainingConfig(), version)
    scores, metrics, models = train_image_models(TrainingConfig(), version, folder, max_concurrent, lambda line: None)
    positions = version.training_positions
    expected = 10.0 * positions + version.lesions["fold"].to_numpy()[positions]
    assert np.array_equal(scores, np.stack([expected, -expected], axis=1))
    malignant = version.lesions["label"].to_numpy()[positions] == 1
    for row in metrics:
        own = version.lesions["fold"].to_numpy()[positions] == row["fold"]
        lower_first = [a < b for a in positions[own & malignant] for b in positions[own & ~malignant]]
        assert row["auc"] == (np.mean(lower_first) if lower_first else None)
    assert [row["fold"] for row in metrics] == [0, 1, 2] and any(row["auc"] is not None for row in metrics)
    # An ensemble's embedding is the first network's.
    assert [model.checkpoint.name for model in models] == [
        f"checkpoint_{name}" for name in ("refit", "fold_0", "fold_1", "fold_2")
    ]
    assert trainings.most == max_concurrent
    assert sorted(trainings.begun) == ["fold_0", "fold_1", "fold_2", "refit"]


@pytest.mark.parametrize("max_concurrent", [1, 2])
def test_what_was_trained_before_a_failure_is_not_trained_again(tmp_path, monkeypatch, version, max_concurrent):
    first = Trainings(monkeypatch, tmp_path, version, max_concurrent, failing="fold_0")
    folder = RunFolder(tmp_path / "run", TrainingConfig(), version)
    with pytest.raises(RuntimeError, match="fold_0 diverged"):
        train_image_models(TrainingConfig(), version, folder, max_concurrent, lambda line: None)
    kept = {file.stem for file in (tmp_path / "run").glob("*.json")} - {"run"}
    assert kept == set(first.begun) - {"fold_0"} and "refit" in kept

    second = Trainings(monkeypatch, tmp_path, version, 1)
    scores, _, _ = train_image_models(TrainingConfig(), version, folder, 1, lambda line: None)
    assert np.isfinite(scores).all()
    assert set(second.begun) == {"refit", "fold_0", "fold_1", "fold_2"} - kept


def test_metrics_of_a_fold_without_malignant_lesions_are_null_in_the_record(tmp_path, version):
    folder = RunFolder(tmp_path / "run", TrainingConfig(), version)
    trained = TrainedImageModel(tmp_path, {"auc": float("nan"), "pauc": np.float64("nan"), "train_loss": 0.5})
    first = folder.train("fold_0", lambda: trained)
    record = (tmp_path / "run" / "fold_0.json").read_text()
    assert "NaN" not in record and '"auc": null' in record
    again = folder.train("fold_0", lambda: pytest.fail("trained twice"))
    assert first == again and again.metrics == {"auc": None, "pauc": None, "train_loss": 0.5}
