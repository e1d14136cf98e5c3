"""What a step minimises: the plain loss unless asked otherwise, the formula in the docstring when asked."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from training.config import TrainingConfig
from training.epoch import ExponentialMovingAverage, train_epoch
from training.objective import Objective, build_objective


def random_batch(rows=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    images = torch.randint(0, 256, (rows, 4, 4, 3), generator=generator, dtype=torch.uint8)
    return logits, {"image": images, "label": torch.arange(rows) % classes}


def softmax(values):
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_without_a_teacher_or_at_weight_0_the_loss_is_plain_cross_entropy():
    logits, batch = random_batch()
    expected = functional.cross_entropy(logits, batch["label"], label_smoothing=0.1)
    assert torch.equal(Objective(0.1)((logits, None), batch), expected)
    teacher = Objective(0.1, teacher=lambda images: 9 * logits.flip(0), distillation_weight=0.0, temperature=3.0)
    assert torch.allclose(teacher((logits, None), batch), expected)


def test_the_loss_is_the_documented_formula():
    logits, batch = random_batch()
    taught, _ = random_batch(seed=1)
    hidden = torch.linspace(-2, 2, 6)
    malignant = torch.tensor([False, True, False, True])
    objective = Objective(0.0, malignant, 2.0, lambda images: taught, 0.3, 4.0)
    loss = float(objective((logits, None, hidden), batch))

    labels, rows = batch["label"].numpy(), np.arange(6)
    entropy = -np.log(softmax(logits.double().numpy())[rows, labels]).mean()
    student, teacher = softmax(logits.double().numpy() / 4), softmax(taught.double().numpy() / 4)
    divergence = (teacher * np.log(teacher / student)).sum(axis=1).mean()
    probability = 1 / (1 + np.exp(-hidden.double().numpy()))
    target = np.isin(labels, [1, 3])
    binary = -np.log(np.where(target, probability, 1 - probability)).mean()
    assert loss == pytest.approx(0.7 * entropy + 0.3 * 16 * divergence + 2.0 * binary, rel=1e-5)


def test_a_config_becomes_its_objective(many_classes):
    device = torch.device("cpu")
    plain = build_objective(TrainingConfig(), many_classes, None, device)
    assert plain.malignant is None and plain.teacher is None and plain.label_smoothing == 0.05
    fields = {
        "optimizer": {"malignant_weight": 0.5},
        "distillation": {"teacher_run": "/runs/x", "weight": 0.9, "temperature": 5},
    }
    both = build_objective(TrainingConfig.model_validate(fields), many_classes, len, device)
    assert both.malignant.tolist() == [False, True, True] and both.malignant_weight == 0.5
    assert (both.teacher, both.distillation_weight, both.temperature) == (len, 0.9, 5.0)


class Pixels(nn.Module):
    """Logits linear in the four pixels of a grey picture."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        values = images[..., 0].flatten(1).float() / 64 - 2
        return self.head(values), values


def test_a_student_of_few_labels_comes_closer_to_its_teacher_when_it_learns_from_it():
    """24 labels drawn from the teacher's own probabilities say less than the probabilities themselves."""
    generator = torch.Generator().manual_seed(0)
    teacher = Pixels().requires_grad_(False)
    teacher.head.weight.copy_(torch.randn(3, 4, generator=generator))
    images = torch.randint(0, 256, (300, 2, 2, 1), generator=generator, dtype=torch.uint8)
    probabilities = torch.softmax(teacher(images)[0], dim=1)
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    train = {"image": images[:24], "label": labels[:24]}

    def distance(objective):
        torch.manual_seed(1)
        student = Pixels()
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        average = ExponentialMovingAverage(student, 0.9)
        train_epoch(student, [train] * 150, optimizer, scheduler, average, student, objective)
        with torch.no_grad():
            scores = torch.log_softmax(average.model(images[24:])[0], dim=1)
        return float(functional.kl_div(scores, probabilities[24:], reduction="batchmean"))

    alone = distance(Objective())
    taught = distance(Objective(teacher=lambda pixels: teacher(pixels)[0], distillation_weight=0.9, temperature=2.0))
    assert taught < 0.3 * alone
