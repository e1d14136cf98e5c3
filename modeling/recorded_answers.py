"""An engine beside torch: the bundle's recorded pictures, and how far the engine's answers are from torch's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from modeling.engine_interface import Engine, EngineOutput


class Parity(BaseModel):
    """Largest differences from the recorded answers, over every picture and batch size.

    Attributes:
        probability: absolute, any class probability.
        logit: absolute.
        embedding: relative to the largest reference value.
        batches: absolute, a class probability of one picture in batches of different sizes.
    """

    model_config = ConfigDict(extra="forbid")

    probability: float
    logit: float
    embedding: float
    batches: float


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities of logits (N, K)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def check_output(output: EngineOutput, rows: int, num_classes: int, embedding_dim: int) -> None:
    """Raises ValueError for an output of the wrong shape or with values that are not finite."""
    expected = {"logits": (rows, num_classes), "embedding": (rows, embedding_dim), "cam": (rows, num_classes)}
    for name, shape in expected.items():
        got = getattr(output, name)
        if got is None or got.ndim != (4 if name == "cam" else 2) or got.shape[:2] != shape:
            raise ValueError(f"{name} has shape {getattr(got, 'shape', None)}; expected {shape} first")
        if not np.isfinite(got).all():
            raise ValueError(f"{name} holds values that are not finite in a batch of {rows}")


def measure_parity(engine: Engine, reference: dict[str, np.ndarray], batches: Sequence[int]) -> Parity:
    """Largest differences between an engine and torch's recorded answers, in batches of every given size.

    Args:
        reference: images uint8 (P, S, S, 3), logits (P, K), embedding (P, D), as `Bundle.parity` returns them.

    Raises:
        ValueError: an output of the wrong shape or with values that are not finite.
    """
    logits, embedding = reference["logits"].astype(np.float64), reference["embedding"].astype(np.float64)
    expected, answers, differences = softmax(logits), [], []
    for batch in batches:
        # The pictures repeat where there are fewer of them than a batch holds.
        rows = np.arange(-(-len(logits) // batch) * batch) % len(logits)
        probabilities = np.empty_like(expected)
        for picked in rows.reshape(-1, batch):
            output = engine.run(reference["images"][picked], with_cam=True)
            check_output(output, batch, logits.shape[1], embedding.shape[1])
            found = softmax(output.logits.astype(np.float64))
            probabilities[picked] = found
            differences.append(
                (
                    np.abs(found - expected[picked]).max(),
                    np.abs(output.logits - logits[picked]).max(),
                    np.abs(output.embedding - embedding[picked]).max() / max(np.abs(embedding).max(), 1e-12),
                )
            )
        answers.append(probabilities)
    probability, logit, relative = (float(value) for value in np.max(differences, axis=0))
    between = float(np.ptp(answers, axis=0).max())
    return Parity(probability=probability, logit=logit, embedding=relative, batches=between)
