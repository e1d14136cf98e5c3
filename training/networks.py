"""The network that a training config describes: new, or as a run left it."""

from __future__ import annotations

from pathlib import Path

import torch

from modeling.image_scorer import ImageScorer, create_scorer
from modeling.schema import TaskSpec
from training.config import TrainingConfig

CHECKPOINT_FILE = "model.pt"


def create_network(config: TrainingConfig, task: TaskSpec) -> ImageScorer:
    """The network with its initial weights.

    Raises:
        ValueError: a backbone that cannot be built, or weights that are missing or do not fit.
    """
    return _build(config, task, config.model.weights, config.model.frozen_blocks)


def load_network(checkpoint: Path, config: TrainingConfig, task: TaskSpec) -> ImageScorer:
    """The averaged weights of a checkpoint folder as a network in evaluation mode, on the CPU."""
    scorer = _build(config, task, "none", 0)
    state = torch.load(checkpoint / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
    scorer.load_state_dict(state["average"])
    return scorer.eval()


def _build(config: TrainingConfig, task: TaskSpec, weights: str, frozen_blocks: int) -> ImageScorer:
    model = config.model
    malignant = task.malignant_mask.tolist() if config.optimizer.malignant_weight > 0 else None
    return create_scorer(
        model.backbone, task.num_classes, weights, model.dropout, frozen_blocks, model.input_size, malignant
    )
