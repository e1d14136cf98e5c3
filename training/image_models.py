"""The image models of one run: one per fold for out-of-fold scores, and the refit that is served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from data_pipelines.image_dataset import DatasetVersion
from training.config import TrainingConfig
from training.distillation import teacher_settings
from training.networks import create_network
from training.run_folder import RUN_FILE, network_name, read_identity, read_network
from training.trainer import TrainedImageModel, build_trainer, fit


class RunFolder:
    """A training run's folder: finished folds are kept, so that an interrupted run goes on where it stopped.

    Raises:
        ValueError: the folder belongs to a run with another config or data set.
    """

    def __init__(self, path: Path, config: TrainingConfig, version: DatasetVersion):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        # Configs are compared, not files: a run begun before a field existed had that field's default.
        if (path / RUN_FILE).exists() and read_identity(path) != (config, version.digest):
            raise ValueError(f"run folder {path} holds a run with another config or data set; give another run_name")
        identity = json.dumps({"config": config.model_dump(), "dataset": version.digest}, sort_keys=True)
        (path / RUN_FILE).write_text(identity, encoding="utf-8")

    def train(self, name: str, train: Callable[[], TrainedImageModel]) -> TrainedImageModel:
        """Returns the finished model `name`, training it unless an earlier attempt has."""
        if (finished := read_network(self.path, name)) is not None:
            return TrainedImageModel(Path(finished["checkpoint"]), finished["metrics"])
        model = train()
        record = self.path / f"{name}.json"
        # A fold without malignant lesions has no AUC: null, since JSON knows no NaN.
        metrics = {name: None if value != value else value for name, value in model.metrics.items()}
        facts = {"checkpoint": str(model.checkpoint), "metrics": metrics}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts, default=float, allow_nan=False), encoding="utf-8")
        temporary.replace(record)
        return TrainedImageModel(model.checkpoint, metrics)


def check_training(config: TrainingConfig, version: DatasetVersion, folds: Iterable[int | None]) -> None:
    """Finds before a cluster starts what would fail in every train worker, again and again.

    Raises:
        ValueError: a setting that makes no sense for the task, a teacher run that lacks one of the folds' networks, a
            backbone that cannot be built, or weights that are missing or do not fit.
    """
    config.check_task(version.task)
    initial = {}
    for fold in folds:
        teacher_settings(config, version.digest, fold)
        of_network = config.of_network(network_name(fold))
        initial[of_network.model.weights] = of_network
    for of_network in initial.values():
        create_network(of_network, version.task)


def train_image_models(
    config: TrainingConfig,
    version: DatasetVersion,
    folder: RunFolder,
    max_concurrent: int,
    say: Callable[[str], None],
) -> tuple[np.ndarray, list[dict], list[TrainedImageModel]]:
    """Trains one network per fold and the refit on all folds, `max_concurrent` at a time.

    When one fails, those in training are finished and kept before the error is raised; the others are not begun.

    Returns:
        Out-of-fold log-probabilities float64 (N, K) of all training rows in table order, each fold's metrics, and the
        networks, the refit first.
    """
    # The refit has the most rows; begun last it would end alone, long after the others.
    folds: list[int | None] = [None, *version.training_folds]
    if max_concurrent == 1:
        # In the main thread, where Ray Train ends a run cleanly on Ctrl-C.
        models = [_train(config, version, folder, fold, say) for fold in folds]
    else:
        with ThreadPoolExecutor(max_concurrent) as pool:
            started = [pool.submit(_train, config, version, folder, fold, say) for fold in folds]
            try:
                for future in as_completed(started):
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            models = [future.result() for future in started]
    return *_out_of_fold(version, models[1:]), models


def _train(
    config: TrainingConfig, version: DatasetVersion, folder: RunFolder, fold: int | None, say: Callable[[str], None]
) -> TrainedImageModel:
    name = network_name(fold)
    say("refit: training on all folds" if fold is None else f"{name}: training on the other folds")
    return folder.train(name, lambda: fit(build_trainer(config, version, fold, str(folder.path), name)))


def _out_of_fold(version: DatasetVersion, models: list[TrainedImageModel]) -> tuple[np.ndarray, list[dict]]:
    positions = version.training_positions
    folds = version.lesions["fold"].to_numpy()[positions]
    scores = np.full((len(positions), version.task.num_classes), np.nan)
    metrics = []
    for fold, model in zip(version.training_folds, models, strict=True):
        rows, log_probabilities = model.predictions(version.task)
        members = np.flatnonzero(folds == fold)
        assert len(rows) == len(members), f"fold {fold}: {len(rows)} predictions for {len(members)} rows"
        scores[members[rows]] = log_probabilities
        # Of all rows: a worker reports those of its own share.
        whole = {
            name: None if np.isnan(value) else value for name, value in model.validation_scores(version.task).items()
        }
        metrics.append({"fold": fold, **model.metrics, **whole})
    assert np.isfinite(scores).all(), "a training row has no out-of-fold score"
    return scores, metrics
