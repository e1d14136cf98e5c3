"""Training-time augmentation: one recipe on uint8 pictures of the network's input size.

It runs where it is cheapest: inside the read task (albumentations), or on the train worker's device
(training.device_augmentation).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class AugmentationConfig(BaseModel):
    """`light`: flips, transpose, brightness. `full` adds the ISIC 2024 recipe: colour, blur or noise, distortion,
    shift-scale-rotate and one coarse dropout. `strength` scales the magnitudes. `place`: in the read task on a CPU, or
    on the train worker's device, to which the pictures are shipped as uint8."""

    model_config = ConfigDict(extra="forbid")

    recipe: Literal["none", "light", "full"] = "full"
    strength: float = Field(1.0, ge=0.0, le=3.0)
    place: Literal["read_task", "device"] = "read_task"


@dataclass(frozen=True)
class Recipe:
    """What both implementations draw from: ranges are symmetric unless they say otherwise, `*_p` are probabilities.

    Attributes:
        brightness, contrast: added share of full scale, relative gain.
        blur_sigma: of a Gaussian, in pixels, from-to; noise_std: share of full scale, from-to; one of the two.
        distortion: of the optical (radial) or the grid distortion, one of the two; grid_steps: cells a side.
        hue, saturation, value: in OpenCV's 8-bit HSV units (hue 0-180).
        shift, scale: shares of the side; rotate: degrees.
        hole: side of the square that is dropped, in pixels.
    """

    brightness: float
    contrast: float
    hole: int
    noise_std: tuple[float, float]
    distortion: float
    hue: float
    saturation: float
    value: float
    shift: float
    scale: float
    rotate: float
    brightness_p: float = 0.75
    blur_sigma: tuple[float, float] = (0.5, 3.0)
    blur_sizes: tuple[int, int] = (3, 5)
    blur_or_noise_p: float = 0.4
    distortion_p: float = 0.3
    grid_steps: int = 5
    colour_p: float = 0.5
    affine_p: float = 0.8
    hole_p: float = 0.5


def recipe_of(config: AugmentationConfig, input_size: int) -> Recipe:
    """The magnitudes of a config at one picture size."""
    strength = config.strength
    return Recipe(
        brightness=min(0.2 * strength, 0.9),
        contrast=min(0.2 * strength, 0.9),
        hole=max(2, int(input_size * 0.25 * min(strength, 2.0))),
        noise_std=(0.01, 0.05 * max(strength, 0.3)),
        distortion=min(0.3 * strength, 0.9),
        hue=10 * strength,
        saturation=20 * strength,
        value=10 * strength,
        shift=0.1 * strength,
        scale=0.1 * strength,
        rotate=15 * strength,
    )


def build_augmentation(
    config: AugmentationConfig, input_size: int, seed: int
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns uint8 (S, S, 3) -> uint8 (S, S, 3), seeded, or None for the recipe `none`."""
    if config.recipe == "none":
        return None
    # Otherwise albumentations asks the network for its newest version when imported.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    from data_pipelines.lesion_transforms import LesionWarp, OneHole, TableNoise

    recipe, full = recipe_of(config, input_size), config.recipe == "full"
    brightness = A.RandomBrightnessContrast(
        brightness_limit=recipe.brightness, contrast_limit=recipe.contrast, p=recipe.brightness_p
    )
    blur = A.GaussianBlur(blur_limit=recipe.blur_sizes, sigma_limit=recipe.blur_sigma)
    blur_or_noise = A.OneOf([blur, TableNoise(recipe.noise_std)], p=recipe.blur_or_noise_p)
    colour = A.HueSaturationValue(
        hue_shift_limit=recipe.hue,
        sat_shift_limit=recipe.saturation,
        val_shift_limit=recipe.value,
        p=recipe.colour_p,
    )
    warp = LesionWarp(recipe, moves=full)
    steps = (
        [brightness, blur_or_noise, warp, colour, OneHole(recipe.hole, recipe.hole_p)] if full else [brightness, warp]
    )
    pipeline = A.Compose(steps, seed=seed)
    return lambda image: np.ascontiguousarray(pipeline(image=image)["image"])
