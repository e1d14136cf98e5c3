"""The Ray-free loop: it learns, averages, schedules and predicts what it says."""

import numpy as np
import pytest
import torch
from torch import nn

from training.epoch import ExponentialMovingAverage, parameter_groups, predict, train_epoch, warmup_cosine
from training.objective import Objective


class Brightness(nn.Module):
    """Two logits from the mean pixel; enough to learn bright against dark."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.head = nn.Linear(1, 2)

    def forward(self, images):
        mean = self.norm(images.float().mean(dim=(1, 2, 3), keepdim=False)[:, None] / 255)
        return self.head(mean), mean


def batches(rows=256, size=16, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    images = (60 + 120 * labels[:, None, None, None] + generator.normal(0, 10, (rows, 4, 4, 3))).clip(0, 255)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        yield {
            "image": torch.from_numpy(images[part].astype(np.uint8)),
            "label": torch.from_numpy(labels[part]),
            "row": torch.arange(start, start + size),
        }


def test_training_learns_and_prediction_keeps_rows_and_labels_together():
    torch.manual_seed(0)
    model = Brightness()
    average = ExponentialMovingAverage(model, 0.9)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 48, 0.1))
    losses = [train_epoch(model, batches(), optimizer, scheduler, average, model, Objective()) for _ in range(3)]
    assert losses[-1]["train_loss"] < 0.5 * losses[0]["train_loss"]
    assert losses[0]["train_rows"] == 256
    result = predict(average.model, batches(seed=1))
    expected = np.concatenate([batch["label"].numpy() for batch in batches(seed=1)])
    assert np.array_equal(result["label"], expected) and np.array_equal(result["row"], np.arange(256))
    assert np.allclose(np.exp(result["log_probabilities"]).sum(axis=1), 1, atol=1e-5)
    assert (result["log_probabilities"].argmax(axis=1) == expected).mean() > 0.95


def test_a_diverged_loss_stops_the_run_with_advice():
    model = Brightness()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train_epoch(model, batches(), optimizer, scheduler, ExponentialMovingAverage(model, 0.9), model, Objective())


def test_the_average_leaves_its_initial_weights_even_in_a_short_run():
    model = nn.Linear(1, 1)
    average = ExponentialMovingAverage(model, 0.999)
    with torch.no_grad():
        model.weight += 10.0
    target = float(model.weight.detach())
    for _ in range(40):
        average.update(model)
    assert abs(float(average.model.weight) - target) < 0.1


def test_the_schedule_warms_up_then_falls():
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in zip(factors[10:], factors[11:], strict=False))
    assert factors[-1] < 0.01


def test_weight_decay_spares_biases_normalisation_and_frozen_weights():
    model = Brightness()
    model.head.weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["params"] == [] and len(plain["params"]) == 3
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
