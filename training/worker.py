"""The train loop that every Ray Train worker runs. Importable, so that it is pickled by reference."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray.train
import ray.train.torch
import torch

from data_pipelines.epoch_sampling import EpochCursor
from modeling.image_scorer import ExportableScorer
from modeling.metrics import partial_auc_above_tpr, risk, roc_auc
from modeling.schema import TaskSpec
from training.config import TrainingConfig
from training.device_augmentation import DeviceAugmentation
from training.distillation import Teacher
from training.epoch import ExponentialMovingAverage, parameter_groups, predict, train_epoch, warmup_cosine
from training.networks import CHECKPOINT_FILE, create_network
from training.objective import build_objective

PROGRESS_SECONDS = 5.0


def predictions_file(rank: int) -> str:
    return f"predictions_{rank}.parquet"


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Trains one image model and reports a checkpoint per epoch; resumes from the run's latest checkpoint.

    `settings`: config (TrainingConfig dump), task (TaskSpec dump), epoch_rows (rows an epoch over all workers),
    cursor (URL of the epoch file), title (for progress lines), evaluate ("last", "every" or "never"), teacher (see
    training.distillation; None without).
    The checkpoint holds model.pt and, after an evaluation, predictions_<rank>.parquet with row, label, lp_<class>.
    """
    config = TrainingConfig.model_validate(settings["config"])
    task = TaskSpec.model_validate(settings["task"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads())
    # Activations and gradients far below anything that matters, which a CPU computes many times slower.
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)

    scorer = create_network(config, task).to(memory_format=torch.channels_last)
    model = ray.train.torch.prepare_model(scorer)
    unwrapped = model.module if hasattr(model, "module") else model
    average = ExponentialMovingAverage(unwrapped, config.optimizer.ema_decay)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay), lr=config.optimizer.learning_rate
    )
    steps_per_epoch = max(1, math.ceil(settings["epoch_rows"] / world_size / config.optimizer.batch_size))
    total_steps = steps_per_epoch * config.optimizer.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, total_steps, config.optimizer.warmup_fraction)
    )
    first_epoch = _restore(unwrapped, average, optimizer, scheduler)

    device = ray.train.torch.get_device()
    augment = None
    if config.augmentation.place == "device" and config.augmentation.recipe != "none":
        augment = DeviceAugmentation(config.augmentation, config.model.input_size, device, config.seed, rank)
    teacher = None if settings["teacher"] is None else Teacher(settings["teacher"], task, device)
    objective = build_objective(config, task, teacher, device)
    cursor = EpochCursor(settings["cursor"])
    progress = _Progress(settings["title"], config.optimizer.epochs, steps_per_epoch) if rank == 0 else None
    if progress and first_epoch:
        progress.line(f"resumed after epoch {first_epoch} of {config.optimizer.epochs}")
    if first_epoch == config.optimizer.epochs:
        # Killed between the last report and the run's end: the checkpoint already holds everything.
        return

    for epoch in range(first_epoch, config.optimizer.epochs):
        # Dropout draws the same masks in a resumed epoch as in one that was not cut short.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, epoch, rank]).generate_state(1)[0]))
        if rank == 0:
            cursor.announce(epoch)
        # Every worker asks for batches only after the announcement; the split waits for all of them.
        batches = _checked(ray.train.get_dataset_shard("train"), config.optimizer.batch_size, device, epoch)
        if augment is not None:
            augment.start_epoch(epoch)
            batches = ({**batch, "image": augment(batch["image"])} for batch in batches)
        started = time.monotonic()
        metrics: dict[str, Any] = train_epoch(
            model,
            batches,
            optimizer,
            scheduler,
            average,
            unwrapped,
            objective,
            progress.step(epoch) if progress else None,
        )
        metrics |= {
            "epoch": epoch + 1,
            "resumed_after": first_epoch,
            "train_rows_per_second": metrics["train_rows"] / (time.monotonic() - started),
        }
        last = epoch + 1 == config.optimizer.epochs
        predictions = None
        if settings["evaluate"] == "every" or (settings["evaluate"] == "last" and last):
            predictions = _evaluate(average.model, config, device, rank, world_size)
            metrics |= _scores(predictions, task)
        if progress:
            shown = {name: round(value, 4) for name, value in metrics.items() if name not in ("epoch", "train_rows")}
            progress.line(f"epoch {epoch + 1}/{config.optimizer.epochs} done: {json.dumps(shown)}")
        _report(metrics, unwrapped, average, optimizer, scheduler, epoch + 1, predictions, task, rank)


class _Progress:
    """Rank 0's progress lines, at most one every few seconds."""

    def __init__(self, title: str, epochs: int, steps: int):
        self.title, self.epochs, self.steps = title, epochs, steps
        self.last = time.monotonic()

    def line(self, text: str) -> None:
        # Ray Train wraps print and logging, which would show the line twice.
        sys.stderr.write(f"{self.title}: {text}\n")
        sys.stderr.flush()

    def step(self, epoch: int):
        def on_step(step: int, loss: float, rate: float) -> None:
            if time.monotonic() - self.last >= PROGRESS_SECONDS:
                self.last = time.monotonic()
                where = f"epoch {epoch + 1}/{self.epochs} step {step}/{self.steps}"
                self.line(f"{where} loss {loss:.3f} {rate:.0f} images/s")

        return on_step


def _checked(shard, batch_size: int, device: torch.device, epoch: int):
    """Batches of the shard, refusing rows that were drawn for another epoch."""
    for batch in shard.iter_torch_batches(batch_size=batch_size, device=device, prefetch_batches=2):
        if not bool((batch["epoch"] == epoch).all()):
            raise RuntimeError(f"epoch {epoch} received rows drawn for epoch {int(batch['epoch'][0])}")
        if len(batch["label"]) > 1:  # batch normalisation needs two rows
            yield batch


def _evaluate(
    model: torch.nn.Module, config: TrainingConfig, device: torch.device, rank: int, world_size: int
) -> dict[str, np.ndarray]:
    """Predictions of this worker's share of the validation rows (row % world_size == rank)."""
    shard = ray.train.get_dataset_shard("validation")

    def mine():
        for batch in shard.iter_torch_batches(batch_size=64, device=device, prefetch_batches=2):
            keep = batch["row"] % world_size == rank
            yield {name: value[keep] for name, value in batch.items()} if world_size > 1 else batch

    return predict(ExportableScorer([model], config.model.num_views), mine())


def _scores(predictions: dict[str, np.ndarray], task: TaskSpec) -> dict[str, float]:
    """AUC and pAUC of this worker's share, for progress and pruning; NaN where only one class is present."""
    malignant = task.malignant_mask[predictions["label"].astype(int)]
    scores = risk(np.exp(predictions["log_probabilities"]), task)
    return {"auc": float(roc_auc(malignant, scores)), "pauc": float(partial_auc_above_tpr(malignant, scores))}


def _restore(unwrapped, average, optimizer, scheduler) -> int:
    """Loads the latest checkpoint into the given objects; returns the number of finished epochs."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        state = torch.load(Path(directory) / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
    unwrapped.load_state_dict(state["model"])
    average.model.load_state_dict(state["average"])
    average.steps = state["average_steps"]
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(state["epoch"])


def _report(metrics, unwrapped, average, optimizer, scheduler, epoch, predictions, task, rank) -> None:
    """Reports metrics with a checkpoint; Ray Train merges the workers' files into one."""
    with tempfile.TemporaryDirectory() as directory:
        if predictions is not None:
            table = {"row": predictions["row"], "label": predictions["label"]}
            for position, name in enumerate(task.classes):
                table[f"lp_{name}"] = predictions["log_probabilities"][:, position]
            pd.DataFrame(table).to_parquet(Path(directory) / predictions_file(rank))
        if rank == 0:
            state = {
                "epoch": epoch,
                "model": unwrapped.state_dict(),
                "average": average.model.state_dict(),
                "average_steps": average.steps,
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(state, Path(directory) / CHECKPOINT_FILE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))
