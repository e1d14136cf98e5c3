"""Where the network sees evidence for a class: the class-activation map of a picture, drawn over it.

What is drawn is the weight of evidence: the log-odds of the class that the network would give if the whole picture
looked like this cell, less the log-odds of the class in its training sample. The maps' cells plus the head's bias have
the logits as their mean, so this is the network's own sum taken apart; 0 says that a cell changes nothing.

Only what is above 0 is coloured. Colour grows in proportion to it, and is full at the picture's strongest cell, but
never below FULL_COLOUR: a faint map stays faint instead of being stretched into a red blob.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import cv2
import numpy as np

from modeling.preprocessing import image_quality, resize
from modeling.schema import TaskSpec
from serve.api import View
from serve.errors import invalid_field
from serve.lesion import decode_upload
from serve.settings import UploadLimits

VIEWS: tuple[View, ...] = get_args(View)

# Longest side of what is drawn, pixels.
MAX_SIDE = 1024
# Log-odds of 19 to 1: a cell that would by itself lift even chances to 95 %.
FULL_COLOUR = math.log(19.0)
# A class without a training picture has odds of 0, which would make everything evidence.
_LEAST_PRIOR = 1e-4
# At full colour the skin's structure must still be seen through it. Opacity grows with the square of the strength:
# weak evidence is often spread over the whole picture, and would tint it.
_MAX_OPACITY = 0.6
# From dark purple over green to yellow, brighter step by step: readable without red and green, and in grey.
_COLOURS = cv2.COLORMAP_VIRIDIS


@dataclass(frozen=True)
class Picture:
    """An uploaded picture that is to be explained.

    Attributes:
        shown: uint8 RGB (H, W, 3), turned as the network saw it, at most MAX_SIDE a side.
        pixels: uint8 RGB (S, S, 3), the network's input.
        quality: figures of the whole picture, see `image_quality`.
    """

    shown: np.ndarray
    pixels: np.ndarray
    quality: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """A drawn map.

    Attributes:
        png: the file.
        target_class: whose evidence it shows.
        digest: of the bundle that made it; version: its version in the registry.
        reasons: why the model gives no risk for this picture; empty where it does.
    """

    png: bytes
    target_class: str
    digest: str
    version: str
    reasons: tuple[str, ...]


def open_picture(data: bytes, input_size: int, limits: UploadLimits | None) -> Picture:
    """Checks and decodes an upload as `prepare` does; without limits, one that was checked when it was uploaded.

    Raises:
        ApiError: 413, 415 or 422, see `decode_upload`.
    """
    image = decode_upload(data, limits)
    return Picture(shrink(image), resize(image, input_size), image_quality(image))


def shrink(image: np.ndarray, side: int = MAX_SIDE) -> np.ndarray:
    """A picture (H, W, 3) whose longest side has at most so many pixels; a smaller one stays as it is."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def parse_class(name: str | None, task: TaskSpec) -> int | None:
    """Index of the class that is to be explained; None stays None.

    Raises:
        ApiError: 422 for a class that the task does not have.
    """
    if name is None:
        return None
    if name not in task.classes:
        raise invalid_field(f"target_class: {name[:60]!r}; expected one of {', '.join(task.classes)}")
    return task.classes.index(name)


def likeliest_malignant(task: TaskSpec, logits: np.ndarray) -> int:
    """Index of the malignant class of highest logit (K,): what is explained where no class is asked for."""
    return int(np.where(task.malignant_mask, logits, -np.inf).argmax())


def weight_of_evidence(maps: np.ndarray, logits: np.ndarray, prior: np.ndarray, target: int) -> np.ndarray:
    """What each cell says for one class against all others, log-odds over the training sample's: float64 (h, w).

    Args:
        maps: class-activation maps, float (K, h, w).
        logits: of the same picture, float (K,).
        prior: class frequencies the network was trained at, (K,).
        target: index of the class.
    """
    maps, prior = np.asarray(maps, np.float64), np.maximum(prior, _LEAST_PRIOR)
    cells = maps + (logits - maps.mean(axis=(1, 2)))[:, None, None]
    others = np.delete(cells, target, axis=0)
    highest = others.max(axis=0)
    log_odds = cells[target] - (highest + np.log(np.exp(others - highest).sum(axis=0)))
    return log_odds - math.log(prior[target]) + math.log(np.delete(prior, target).sum())


def intensity(evidence: np.ndarray, height: int, width: int) -> np.ndarray:
    """Strength of colour, float32 (height, width) from 0 to 1, of cells (h, w) of evidence.

    The network's input is the whole picture, stretched; so the grid of cells covers the whole picture, and cell
    (i, j) is centred on ((i + 1/2) / h, (j + 1/2) / w) of it.
    """
    # Cut before interpolating: cubic interpolation swings to the other side beside a strong cell.
    cells = np.maximum(evidence, 0.0).astype(np.float32)
    peak = float(cells.max())
    shrinking = height < cells.shape[0] and width < cells.shape[1]
    # Both place the centres of cells as above.
    upsampled = cv2.resize(cells, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    return np.clip(upsampled, 0.0, peak) / max(peak, FULL_COLOUR)


def draw(shown: np.ndarray, evidence: np.ndarray, view: View) -> bytes:
    """A PNG of the map: over the picture, alone (the darkest colour is no evidence), or the picture beside the overlay.

    Args:
        shown: uint8 RGB (H, W, 3).
        evidence: float (h, w), see `weight_of_evidence`.

    Returns:
        An 8-bit RGB PNG of (H, W), or (H, 2 W) side by side.
    """
    strength = intensity(evidence, *shown.shape[:2])
    picture = cv2.cvtColor(shown, cv2.COLOR_RGB2BGR)
    heat = cv2.applyColorMap(np.rint(strength * 255).astype(np.uint8), _COLOURS)
    if view == "map":
        drawn = heat
    else:
        opacity = (_MAX_OPACITY * strength**2)[:, :, None]
        overlay = np.rint(picture * (1 - opacity) + heat * opacity).astype(np.uint8)
        drawn = overlay if view == "overlay" else np.hstack([picture, overlay])
    return cv2.imencode(".png", drawn)[1].tobytes()
