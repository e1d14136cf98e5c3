"""The image models of one run: one per fold for out-of-fold scores, and the refit that is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipelines.image_dataset import DatasetVersion
from training.config import TrainingConfig
from training.trainer import TrainedImageModel, build_trainer, fit


class RunFolder:
    """A training run's folder: finished folds are kept, so that an interrupted run goes on where it stopped.

    Raises:
        ValueError: the folder belongs to a run with another config or data set.
    """

    def __init__(self, path: Path, config: TrainingConfig, version: DatasetVersion):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        identity = json.dumps({"config": config.model_dump(), "dataset": version.digest}, sort_keys=True)
        marker = path / "run.json"
        if marker.exists() and marker.read_text(encoding="utf-8") != identity:
            raise ValueError(f"run folder {path} holds a run with another config or data set; give another run_name")
        marker.write_text(identity, encoding="utf-8")

    def train(self, name: str, train: Callable[[], TrainedImageModel]) -> TrainedImageModel:
        """Returns the finished model `name`, training it unless an earlier attempt has."""
        record = self.path / f"{name}.json"
        if record.exists():
            facts = json.loads(record.read_text(encoding="utf-8"))
            if Path(facts["checkpoint"]).exists():
                return TrainedImageModel(Path(facts["checkpoint"]), facts["metrics"])
        model = train()
        facts = {"checkpoint": str(model.checkpoint), "metrics": model.metrics}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts, default=float), encoding="utf-8")
        temporary.replace(record)
        return model


def train_folds(
    config: TrainingConfig, version: DatasetVersion, folder: RunFolder, say: Callable[[str], None]
) -> tuple[np.ndarray, list[dict]]:
    """Out-of-fold log-probabilities float64 (N, K) of all training rows in table order, and each fold's metrics."""
    positions = version.training_positions
    folds = version.lesions["fold"].to_numpy()[positions]
    scores = np.full((len(positions), version.task.num_classes), np.nan)
    metrics = []
    for fold in version.training_folds:
        say(f"fold {fold + 1}/{version.num_folds}: training on the other folds")
        name = f"fold_{fold}"
        model = folder.train(name, lambda f=fold, n=name: fit(build_trainer(config, version, f, str(folder.path), n)))
        rows, log_probabilities = model.predictions(version.task)
        members = np.flatnonzero(folds == fold)
        assert len(rows) == len(members), f"fold {fold}: {len(rows)} predictions for {len(members)} rows"
        scores[members[rows]] = log_probabilities
        metrics.append({"fold": fold, **model.metrics})
    assert np.isfinite(scores).all(), "a training row has no out-of-fold score"
    return scores, metrics


def train_refit(
    config: TrainingConfig, version: DatasetVersion, folder: RunFolder, say: Callable[[str], None]
) -> TrainedImageModel:
    """The served network, trained on all folds."""
    say("refit: training on all folds")
    return folder.train("refit", lambda: fit(build_trainer(config, version, None, str(folder.path), "refit")))
