"""`build_trainer`: the only way to a Ray Train run, shared by train_model and search_hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import ray
import ray.train
import ray.train.torch

from data_pipelines.epoch_sampling import EpochCursor
from data_pipelines.image_dataset import DatasetVersion, evaluation_dataset, execution_options, training_dataset
from modeling.image_scorer import ImageScorer
from modeling.metrics import partial_auc_above_tpr, risk, roc_auc
from modeling.schema import TaskSpec
from training.config import TrainingConfig
from training.distillation import teacher_settings
from training.networks import load_network
from training.run_folder import network_name
from training.worker import train_loop_per_worker

# On a CPU each step frees and takes the same tens of megabytes of activations. By default glibc hands them back to the
# kernel, which must clear every page again: one thread of tf_efficientnet_lite0 at 128 px then makes 34 pictures/s
# instead of 43. Read by glibc when the process starts, so they cannot be set from the train loop.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_ARENA_MAX": "1",
}


def build_trainer(
    config: TrainingConfig,
    version: DatasetVersion,
    fold: int | None,
    storage_path: str,
    name: str,
    evaluate: Literal["last", "every"] = "last",
    callbacks: list[Any] | None = None,
) -> ray.train.torch.TorchTrainer:
    """A trainer of one image model.

    Args:
        fold: validation fold, the others train; None trains on all folds (never on the gate split) and validates
            nothing.
        storage_path: absolute path or URL for checkpoints.
        name: run name, unique in `storage_path`; a run of the same name resumes.
        evaluate: score the validation fold after the last epoch or after every one.

    Raises:
        ValueError: a setting that makes no sense for the task, or no teacher for this fold.
    """
    config.check_task(version.task)
    folds = [other for other in version.training_folds if other != fold]
    cursor_url = f"{storage_path}/{name}.epoch"
    num_rows = config.sampling.epoch_rows or len(version.positions(folds))
    size = config.model.input_size
    datasets: dict[str, Any] = {
        # Called again whenever a worker group starts, so that a restarted one gets a fresh execution.
        "train": partial(
            training_dataset,
            version,
            folds,
            config.sampling,
            config.augmentation,
            size,
            config.seed,
            EpochCursor(cursor_url),
        )
    }
    if fold is not None:
        datasets["validation"] = partial(evaluation_dataset, version, [fold], size)
    workers = config.workers
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if workers.use_gpu is None else workers.use_gpu
    return ray.train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.of_network(network_name(fold)).model_dump(),
            "task": version.task.model_dump(),
            "epoch_rows": num_rows,
            "cursor": cursor_url,
            "title": name,
            "evaluate": evaluate if fold is not None else "never",
            "teacher": teacher_settings(config, version.digest, fold),
        },
        datasets=datasets,
        # Validation rows must all be scored: an equal split would drop the remainder, so each worker gets every row
        # and scores its share.
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"], execution_options=execution_options()),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            worker_runtime_env={} if use_gpu else {"env_vars": KEEP_FREED_MEMORY},
        ),
    )


@dataclass(frozen=True)
class TrainedImageModel:
    """What one run left behind: its last checkpoint folder and last metrics."""

    checkpoint: Path
    metrics: dict[str, Any]

    def scorer(self, config: TrainingConfig, task: TaskSpec) -> ImageScorer:
        """The averaged weights as a network in evaluation mode, on the CPU."""
        return load_network(self.checkpoint, config, task)

    def predictions(self, task: TaskSpec) -> tuple[np.ndarray, np.ndarray]:
        """Validation rows int64 (N,), ascending, and their log-probabilities float64 (N, K)."""
        table = self._validation_table()
        columns = [f"lp_{name}" for name in task.classes]
        return table["row"].to_numpy(np.int64), table[columns].to_numpy(np.float64)

    def validation_scores(self, task: TaskSpec) -> dict[str, float]:
        """pauc and auc over the validation rows of all train workers, while `metrics` holds those of the first one's
        share; NaN where only one class is present."""
        malignant = task.malignant_mask[self._validation_table()["label"].to_numpy(np.int64)]
        scores = risk(np.exp(self.predictions(task)[1]), task)
        return {"pauc": float(partial_auc_above_tpr(malignant, scores)), "auc": float(roc_auc(malignant, scores))}

    def _validation_table(self) -> pd.DataFrame:
        parts = sorted(self.checkpoint.glob("predictions_*.parquet"))
        return pd.concat([pd.read_parquet(part) for part in parts]).sort_values("row")


def fit(trainer: ray.train.torch.TorchTrainer) -> TrainedImageModel:
    """Runs a trainer to its end.

    Raises:
        ray.train.TrainingFailedError: the run failed more often than `workers.max_failures`.
    """
    result = trainer.fit()
    return TrainedImageModel(Path(result.checkpoint.path), dict(result.metrics or {}))


def fit_fold(trainer: ray.train.torch.TorchTrainer, version: DatasetVersion, fold: int) -> dict[str, float]:
    """Runs a fold's trainer to its end; returns `TrainedImageModel.validation_scores`.

    Its checkpoint may lie on storage that this process does not mount.

    Raises:
        ray.train.TrainingFailedError: the run failed more often than `workers.max_failures`.
    """
    result = trainer.fit()
    with result.checkpoint.as_directory() as directory:
        model = TrainedImageModel(Path(directory), dict(result.metrics or {}))
        scored, expected = len(model.predictions(version.task)[0]), len(version.positions([fold]))
        assert scored == expected, f"fold {fold}: {scored} predictions for {expected} rows"
        return model.validation_scores(version.task)
