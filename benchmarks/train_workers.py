"""Ray Train workers that only take batches: what the pipeline delivers to one and to several of them."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import ray.data
import ray.train
import ray.train.torch

from data_pipelines.augmentation import AugmentationConfig
from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.image_dataset import execution_options, read_images

BATCH = 128


def take_batches(settings: dict[str, Any]) -> None:
    """A train loop without training: reports rows and the seconds from asking for the first batch to the last."""
    started = time.time()
    rows = sum(
        len(batch["label"]) for batch in ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=BATCH)
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"rows": rows, "started": started, "ended": time.time()}, checkpoint=checkpoint)


def shuffled(path: str, rows: ImageRows, size: int, seed: int) -> ray.data.Dataset:
    order = np.random.default_rng(seed).permutation(len(rows))
    decode = DecodeRecipe(size, AugmentationConfig(recipe="light"), seed)
    return read_images(LesionImageDatasource(path, rows, decode, order=lambda: (0, order)))


def rows_per_second(path: str, rows: ImageRows, size: int, num_workers: int, seed: int) -> float:
    """Rows/s of all workers together, by the slowest one's clock."""
    with tempfile.TemporaryDirectory() as storage:
        result = ray.train.torch.TorchTrainer(
            take_batches,
            datasets={"train": partial(shuffled, path, rows, size, seed)},
            dataset_config=ray.train.DataConfig(execution_options=execution_options()),
            # Half a CPU together: two read tasks fit beside them on two cores.
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers, resources_per_worker={"CPU": 0.5 / num_workers}
            ),
            run_config=ray.train.RunConfig(name=f"take-{num_workers}-{seed}", storage_path=storage),
        ).fit()
    metrics = result.metrics
    # Rank 0 reports for all: an equal split gives each worker as many rows, and they end together.
    return num_workers * metrics["rows"] / (metrics["ended"] - metrics["started"])
