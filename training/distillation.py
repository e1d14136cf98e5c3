"""A student network learns from a finished run's networks (Hinton et al. 2015, "Distilling the knowledge in a neural
network"), without its out-of-fold scores learning from labels they must not know.

The student that is to score fold k learns from the teacher run's network that did not see fold k either, and the refit
from the refit. Both runs have one data set version, hence the same folds. Teacher and student look at the same
augmented picture (Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from modeling.image_scorer import ExportableScorer
from modeling.schema import TaskSpec
from training.config import TrainingConfig
from training.networks import load_network
from training.run_folder import network_name, read_identity, read_network


def teacher_settings(config: TrainingConfig, digest: str, fold: int | None) -> dict[str, Any] | None:
    """Checkpoint folder and config dump of the teacher for the student that does not see `fold` (None: the refit).

    Args:
        digest: of the student's data set.

    Returns:
        {"checkpoint": absolute path, "config": TrainingConfig dump}; None without distillation.

    Raises:
        ValueError: no training run, one of another data set, or one whose network of this fold has not finished.
    """
    if config.distillation is None:
        return None
    folder = Path(config.distillation.teacher_run)
    try:
        teacher, dataset = read_identity(folder)
    except ValueError as error:
        raise ValueError(f"distillation.teacher_run: {error}") from error
    if dataset != digest:
        raise ValueError(
            f"distillation.teacher_run: {folder} was trained on data set {dataset[:12]}, not on {digest[:12]}; "
            "its folds are others"
        )
    network = read_network(folder, network_name(fold))
    if network is None:
        raise ValueError(f"distillation.teacher_run: {folder} has no finished {network_name(fold)} to learn from")
    return {"checkpoint": network["checkpoint"], "config": teacher.model_dump()}


class Teacher:
    """Callable uint8 (N, S, S, 3) -> logits float32 (N, K) as the teacher would serve them from one view.

    Pictures of the student's size are resized to the teacher's, bilinearly: it learns what the teacher makes of what
    the student sees, not of a sharper original.
    """

    def __init__(self, settings: dict[str, Any], task: TaskSpec, device: torch.device):
        config = TrainingConfig.model_validate(settings["config"])
        scorer = load_network(Path(settings["checkpoint"]), config, task)
        self.input_size = config.model.input_size
        self.model = ExportableScorer([scorer]).eval()
        self.model.to(device=device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] != self.input_size:
            pixels = functional.interpolate(
                images.permute(0, 3, 1, 2).float(), size=(self.input_size,) * 2, mode="bilinear", antialias=True
            )
            images = pixels.permute(0, 2, 3, 1)
        logits, _, _ = self.model(images)
        return logits
