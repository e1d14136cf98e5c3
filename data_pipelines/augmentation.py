"""Training-time augmentation: one recipe, run inside the read task on uint8 pictures of the network's input size."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class AugmentationConfig(BaseModel):
    """`light`: flips, transpose, brightness. `full` adds the ISIC 2024 recipe: colour, blur or noise, distortion,
    shift-scale-rotate and one coarse dropout. `strength` scales the magnitudes."""

    model_config = ConfigDict(extra="forbid")

    recipe: Literal["none", "light", "full"] = "full"
    strength: float = Field(1.0, ge=0.0, le=3.0)


def build_augmentation(
    config: AugmentationConfig, input_size: int, seed: int
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns uint8 (S, S, 3) -> uint8 (S, S, 3), seeded, or None for the recipe `none`."""
    if config.recipe == "none":
        return None
    # Otherwise albumentations asks the network for its newest version when imported.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A
    import cv2

    strength = config.strength
    geometric = [A.D4(p=1.0)]
    brightness = A.RandomBrightnessContrast(
        brightness_limit=min(0.2 * strength, 0.9), contrast_limit=min(0.2 * strength, 0.9), p=0.75
    )
    if config.recipe == "light":
        steps = [*geometric, brightness]
    else:
        hole = max(2, int(input_size * 0.25 * min(strength, 2.0)))
        steps = [
            *geometric,
            brightness,
            A.OneOf(
                [A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise(std_range=(0.01, 0.05 * max(strength, 0.3)))], p=0.4
            ),
            A.OneOf(
                [
                    A.OpticalDistortion(distort_limit=min(0.3 * strength, 0.9)),
                    A.GridDistortion(num_steps=5, distort_limit=min(0.3 * strength, 0.9)),
                ],
                p=0.3,
            ),
            A.HueSaturationValue(
                hue_shift_limit=10 * strength, sat_shift_limit=20 * strength, val_shift_limit=10 * strength, p=0.5
            ),
            A.Affine(
                translate_percent=(-0.1 * strength, 0.1 * strength),
                scale=(1 - 0.1 * strength, 1 + 0.1 * strength),
                rotate=(-15 * strength, 15 * strength),
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.8,
            ),
            A.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(hole, hole), hole_width_range=(hole, hole), p=0.5
            ),
        ]
    pipeline = A.Compose(steps, seed=seed)
    return lambda image: np.ascontiguousarray(pipeline(image=image)["image"])
