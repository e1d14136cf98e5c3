"""What every inference engine does: uint8 pictures in; logits, embedding and activation maps out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

INPUT = "images"
LOGITS, EMBEDDING, CAM = "logits", "embedding", "cam"


class EngineUnavailableError(ValueError):
    """This machine cannot run the engine: a package, driver or device is missing, or memory is short.

    Another engine may run here. A damaged file or a wrong option is a plain ValueError.
    """


@dataclass(frozen=True)
class EngineOutput:
    """What the network says about N pictures.

    Attributes:
        logits: float32 (N, K).
        embedding: float32 (N, D).
        cam: class-activation maps float32 (N, K, h, w), where they were asked for.
    """

    logits: np.ndarray
    embedding: np.ndarray
    cam: np.ndarray | None = None


class Engine(Protocol):
    """Runs the image model of one bundle on one device."""

    name: str

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        """Scores uint8 RGB (N, S, S, 3), N >= 1; ValueError for any other shape or dtype."""
        ...

    def warm_up(self, batch: int) -> None:
        """Runs one batch of that size, so that the first request does not pay for allocation or autotuning."""
        ...


def check_images(images: np.ndarray, input_size: int) -> np.ndarray:
    """The pictures in C order.

    Raises:
        ValueError: not uint8 (N, input_size, input_size, 3) with N >= 1.
    """
    expected = (input_size, input_size, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
        raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 (N, {input_size}, {input_size}, 3)")
    return np.ascontiguousarray(images)


def check_names(engine: str, path: object, inputs: list[str], outputs: list[str]) -> None:
    """Refuses a graph that lacks one of the scorer's inputs or outputs.

    Raises:
        ValueError: names what is missing.
    """
    missing = [name for name in (LOGITS, EMBEDDING, CAM) if name not in outputs]
    missing += [name for name in (INPUT,) if name not in inputs]
    if missing:
        raise ValueError(f"engine {engine}: {path} lacks {', '.join(missing)}")
