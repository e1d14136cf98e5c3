"""What a training step minimises.

    (1 - w) CE(labels) + w T^2 KL(teacher || student) + m BCE(malignant)

CE is label-smoothed cross-entropy. KL compares the class probabilities of teacher and student at temperature T, and T^2
keeps its gradients at the scale of CE's (Hinton et al. 2015). BCE is the malignant head's, on whether the label is a
malignant class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from modeling.schema import TaskSpec
from training.config import TrainingConfig


class Objective:
    """Callable (outputs of an ImageScorer in training, batch) -> loss, a scalar.

    Args:
        label_smoothing: of CE, in [0, 1).
        malignant: bool (K,), which classes are malignant; with it the outputs hold the malignant head's logit.
        malignant_weight: m.
        teacher: pictures -> logits (N, K); None: w = 0.
        distillation_weight: w.
        temperature: T.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        malignant: torch.Tensor | None = None,
        malignant_weight: float = 0.0,
        teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
        distillation_weight: float = 0.0,
        temperature: float = 1.0,
    ):
        self.label_smoothing = label_smoothing
        self.malignant, self.malignant_weight = malignant, malignant_weight
        self.teacher = teacher
        self.distillation_weight, self.temperature = distillation_weight, temperature

    def __call__(self, outputs: tuple[torch.Tensor, ...], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, labels = outputs[0], batch["label"]
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.teacher is not None:
            student = functional.log_softmax(logits / self.temperature, dim=1)
            teacher = functional.log_softmax(self.teacher(batch["image"]) / self.temperature, dim=1)
            divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            loss = torch.lerp(loss, self.temperature**2 * divergence, self.distillation_weight)
        if self.malignant is not None:
            target = self.malignant[labels].to(logits.dtype)
            loss = loss + self.malignant_weight * functional.binary_cross_entropy_with_logits(outputs[2], target)
        return loss


def build_objective(
    config: TrainingConfig,
    task: TaskSpec,
    teacher: Callable[[torch.Tensor], torch.Tensor] | None,
    device: torch.device,
) -> Objective:
    """The objective of a config; `teacher` is given exactly where the config has a distillation."""
    optimizer, distillation = config.optimizer, config.distillation
    malignant = torch.tensor(task.malignant_mask, device=device) if optimizer.malignant_weight > 0 else None
    if distillation is None:
        return Objective(optimizer.label_smoothing, malignant, optimizer.malignant_weight)
    return Objective(
        optimizer.label_smoothing,
        malignant,
        optimizer.malignant_weight,
        teacher,
        distillation.weight,
        distillation.temperature,
    )
