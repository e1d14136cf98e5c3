"""The train and evaluate loops, free of Ray: they take any iterable of batches."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Batch = dict[str, torch.Tensor]


class ExponentialMovingAverage:
    """A smoothed copy of a model's weights and floating-point buffers.

    The decay ramps up as (1 + t) / (10 + t), so that short runs are not dominated by the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        source = model.state_dict()
        for name, value in self.model.state_dict().items():
            if value.dtype.is_floating_point:
                value.lerp_(source[name], 1.0 - decay)
            else:
                value.copy_(source[name])


def warmup_cosine(step: int, total: int, warmup_fraction: float) -> float:
    """Learning-rate factor in (0, 1]: linear warm-up, then half a cosine towards 0."""
    warmup = max(1, int(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return max(1e-3, 0.5 * (1.0 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only; biases and normalisation keep none."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    average: ExponentialMovingAverage,
    unwrapped: nn.Module,
    objective: Callable[[tuple[torch.Tensor, ...], Batch], torch.Tensor],
    on_step: Callable[[int, float, float], None] | None = None,
) -> dict[str, float]:
    """One pass over `batches` of {"image": uint8 (N, S, S, 3), "label": int64 (N,)}.

    `objective(outputs, batch)` is the loss of the model's outputs, a scalar. `on_step(step, loss, images_per_second)`
    is called after every step. Returns train_loss and train_rows.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.train()
    total, rows, started = 0.0, 0, time.monotonic()
    for step, batch in enumerate(batches, 1):
        loss = objective(model(batch["image"]), batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"training loss is {value} at step {step}; lower optimizer.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update(unwrapped)
        total += value * len(batch["label"])
        rows += len(batch["label"])
        if on_step is not None:
            on_step(step, value, rows / (time.monotonic() - started))
    return {"train_loss": total / max(rows, 1), "train_rows": rows}


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Log-probabilities float32 (N, K), label int64 (N,) and row int64 (N,) of every batch, in order of arrival.

    `model` gives logits first, whatever else it gives.
    """
    model.eval()
    outputs: dict[str, list[np.ndarray]] = {"log_probabilities": [], "label": [], "row": []}
    for batch in batches:
        if len(batch["label"]) == 0:
            continue
        logits, *_ = model(batch["image"])
        outputs["log_probabilities"].append(functional.log_softmax(logits.float(), dim=1).cpu().numpy())
        outputs["label"].append(batch["label"].cpu().numpy())
        outputs["row"].append(batch["row"].cpu().numpy())
    return {name: np.concatenate(values) if values else np.empty(0) for name, values in outputs.items()}
