"""A prepared dataset version, and the Ray Data datasets that training and scoring read from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import ray

from data_pipelines.augmentation import AugmentationConfig
from data_pipelines.epoch_sampling import EpochCursor, EpochOrder, SamplingConfig, class_shares
from data_pipelines.executor_pacing import PauseUnderBackpressure
from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.hdf5_index import images_bytes, is_url
from data_pipelines.image_reader import ADDED_IMAGES, JoinedFiles
from data_pipelines.stratified_folds import GATE_FOLD
from modeling.schema import TaskSpec

SMALL_CLUSTER_CPUS = 4


@dataclass(frozen=True)
class DatasetVersion:
    """One immutable prepared data set.

    Attributes:
        path: its folder.
        task: columns and classes.
        digest: sha256 over content; names the folder.
        images_path: the HDF5 file its byte ranges point into, joined with the version's own where labelled pictures
            were added; None for a data set of metadata alone.
        lesions: one row per usable image: id, group, context, label, fold (-1 = gate split), offset, size (not of
            metadata alone), columns.
        num_folds: cross-validation folds.
    """

    path: Path
    task: TaskSpec
    digest: str
    images_path: str | JoinedFiles | None
    lesions: pd.DataFrame
    num_folds: int

    def positions(self, folds: list[int]) -> np.ndarray:
        """int64 positions into `lesions` of the rows of these folds."""
        return np.flatnonzero(self.lesions["fold"].isin(folds).to_numpy())

    @property
    def gate_positions(self) -> np.ndarray:
        """int64 positions of the gate split's rows, which train nothing."""
        return self.positions([GATE_FOLD])

    @property
    def training_positions(self) -> np.ndarray:
        """int64 positions of all rows that train."""
        return self.positions(self.training_folds)

    @property
    def training_folds(self) -> list[int]:
        return list(range(self.num_folds))

    def rows(self, positions: np.ndarray) -> ImageRows:
        return image_rows(self.lesions.iloc[positions])


def image_rows(table: pd.DataFrame) -> ImageRows:
    """The byte ranges of a table with columns id, offset, size and, where known, label."""
    label = table["label"].to_numpy(np.int64) if "label" in table else np.full(len(table), -1, np.int64)
    return ImageRows(
        table["id"].to_numpy(str), table["offset"].to_numpy(np.int64), table["size"].to_numpy(np.int64), label
    )


def open_dataset(location: str | Path) -> DatasetVersion:
    """Opens a version folder, or the newest version of a data set's folder.

    Raises:
        ValueError: not a prepared data set, or its image file is gone or has changed size.
    """
    path = Path(location)
    latest = path / "LATEST"
    if latest.exists():
        path = path / latest.read_text(encoding="utf-8").strip()
    description = path / "dataset.json"
    if not description.exists():
        raise ValueError(f"dataset {location} is not a prepared data set; expected a folder made by prepare_dataset")
    facts = json.loads(description.read_text(encoding="utf-8"))
    images = facts["images"]
    if images is not None and not is_url(images) and not Path(images).exists():
        raise ValueError(f"dataset {location}: its image file {images} does not exist any more")
    if images is not None and images_bytes(images) != facts["images_bytes"]:
        raise ValueError(f"dataset {location}: its image file {images} has changed; run prepare_dataset again")
    lesions = pd.read_parquet(path / "lesions.parquet")
    if "added" in lesions:
        own = lesions.pop("added").to_numpy(bool)
        if images is not None:
            # In the table the ranges of added pictures are those of their own file, which can be written anew.
            images = JoinedFiles(images, facts["images_bytes"], str((path / ADDED_IMAGES).resolve()))
            lesions.loc[own, "offset"] += facts["images_bytes"]
    return DatasetVersion(
        path=path,
        task=TaskSpec.model_validate(facts["task"]),
        digest=facts["digest"],
        images_path=images,
        lesions=lesions,
        num_folds=int(facts["num_folds"]),
    )


def training_shares(
    version: DatasetVersion, folds: list[int], sampling: SamplingConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Class shares float64 (K,) of a training epoch, and of the rows it is drawn from."""
    labels = version.lesions["label"].to_numpy(np.int64)[version.positions(folds)]
    counts = np.bincount(labels, minlength=version.task.num_classes)
    return class_shares(counts, version.task, sampling), counts / counts.sum()


def training_dataset(
    version: DatasetVersion,
    folds: list[int],
    sampling: SamplingConfig,
    augmentation: AugmentationConfig,
    input_size: int,
    seed: int,
    cursor: EpochCursor,
) -> ray.data.Dataset:
    """Endless by re-execution: each execution streams the epoch that `cursor` announces."""
    rows = version.rows(version.positions(folds))
    shares, _ = training_shares(version, folds, sampling)
    order = EpochOrder(rows.label, shares, sampling.epoch_rows or len(rows), seed, cursor)
    here = augmentation if augmentation.place == "read_task" else None
    source = LesionImageDatasource(version.images_path, rows, DecodeRecipe(input_size, here, seed), order)
    return read_images(source)


def evaluation_dataset(version: DatasetVersion, folds: list[int], input_size: int) -> ray.data.Dataset:
    """Every row of the folds once, without augmentation; `row` counts within these folds."""
    rows = version.rows(version.positions(folds))
    return read_images(LesionImageDatasource(version.images_path, rows, DecodeRecipe(input_size)))


def read_images(source: LesionImageDatasource) -> ray.data.Dataset:
    """The source as a dataset whose blocks stay as the read tasks yield them, in the source's order."""
    with ray.data.DataContext.current(data_context(source)):
        return ray.data.read_datasource(
            source, override_num_blocks=source.num_tasks, num_cpus=task_cpus(), concurrency=max_read_tasks()
        )


def data_context(source: LesionImageDatasource) -> ray.data.DataContext:
    """The caller's context with what streams this source best."""
    context = ray.data.DataContext.get_current().copy()
    # Our own progress lines say more than a bar per operator; bars of several datasets garble job logs.
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    # Ray gathers blocks until they exceed this, and copies them into one; a full block of ours goes through as it is.
    context.target_max_block_size = source.rows_per_block * source.row_bytes - 1
    context.execution_options = execution_options()
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PauseUnderBackpressure]
    return context


def execution_options() -> ray.data.ExecutionOptions:
    """How Ray Data executes these datasets: in order, so that one seed gives every train worker the same batches."""
    return ray.data.ExecutionOptions(preserve_order=True)


def _small_cluster() -> bool:
    return ray.cluster_resources().get("CPU", 0.0) <= SMALL_CLUSTER_CPUS


def max_read_tasks() -> int | None:
    """One read task per CPU on a small cluster, where each takes half a CPU; None leaves it to Ray.

    Ray keeps as many idle worker processes as there are CPUs: a third one on two CPUs would be ended and started again,
    and import everything again, whenever tasks pause.
    """
    return max(1, int(ray.cluster_resources().get("CPU", 1.0))) if _small_cluster() else None


def task_cpus() -> float:
    """CPUs of a read task or scoring actor: a whole one, but half a one on a small cluster.

    On two cores a service (0.9 CPU), a train worker (0.5) and a trial (0.1) leave less than a whole CPU, and Ray Data
    would wait for one forever without an error.
    """
    return 0.5 if _small_cluster() else 1.0
