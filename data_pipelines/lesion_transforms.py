"""albumentations transforms for lesion tiles: one resampling for every move of pixels, noise from a table, one hole.

Import it only where pictures are augmented: albumentations takes seconds to load.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import albumentations as A
import cv2
import numpy as np

from data_pipelines.augmentation import Recipe

NOISE_TABLE = 2**20


class LesionWarp(A.ImageOnlyTransform):
    """The symmetries of the square and, if `moves`, shift, scale, rotation and an optical or grid distortion.

    All are combined into one bilinear resampling of a square picture, which keeps more detail than three after one
    another and costs less (docs/benchmarks.md). Borders reflect without repeating the edge.

    Coordinates run from -1 to 1 between the centres of the outermost pixels. A pixel of the result is taken from
    D4(affine(distortion(x, y))). The optical distortion is x (1 + k (r² + r⁴)), r in sides from the centre; the grid
    distortion stretches `grid_steps` columns and rows by random factors and keeps the ends.

    Args:
        recipe: probabilities and magnitudes.
        moves: False leaves only the eight symmetries, which lose nothing.
    """

    def __init__(self, recipe: Recipe, moves: bool):
        super().__init__(p=1.0)
        self.recipe, self.moves = recipe, moves

    def get_params(self) -> dict[str, Any]:
        draw = self.py_random
        symmetry = (draw.random() < 0.5, 1 - 2 * draw.getrandbits(1), 1 - 2 * draw.getrandbits(1))
        params: dict[str, Any] = {"symmetry": symmetry, "affine": None, "radial": None, "widths": None}
        recipe = self.recipe
        if self.moves and draw.random() < recipe.affine_p:
            angle = math.radians(draw.uniform(-recipe.rotate, recipe.rotate))
            scale = draw.uniform(1 - recipe.scale, 1 + recipe.scale)
            # A share of the side is twice that in coordinates from -1 to 1.
            shift = [2 * draw.uniform(-recipe.shift, recipe.shift) for _ in range(2)]
            params["affine"] = (angle, scale, *shift)
        if self.moves and draw.random() < recipe.distortion_p:
            limit = recipe.distortion
            if draw.random() < 0.5:
                params["radial"] = draw.uniform(-limit, limit)
            else:
                params["widths"] = [[1 + draw.uniform(-limit, limit) for _ in range(recipe.grid_steps)] for _ in "xy"]
        return params

    def apply(
        self,
        img: np.ndarray,
        symmetry: tuple[bool, int, int],
        affine: tuple[float, float, float, float] | None,
        radial: float | None,
        widths: list[list[float]] | None,
        **_: Any,
    ) -> np.ndarray:
        distorted = radial is not None or widths is not None
        if affine is None and not distorted:
            return _turn(img, *symmetry)
        side = img.shape[0]
        linear, shift = _matrix(symmetry, affine)
        half = (side - 1) / 2
        if not distorted:
            centre = half + half * shift - linear @ np.full(2, half)
            return cv2.warpAffine(
                img,
                np.column_stack([linear, centre]),
                (side, side),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT_101,
            )
        x, y = _radial(side, radial) if radial is not None else _stretched(side, widths)
        linear, shift = (half * linear).astype(np.float32), (half * (shift + 1)).astype(np.float32)
        maps = [linear[row, 0] * x + (linear[row, 1] * y + shift[row]) for row in range(2)]
        return cv2.remap(img, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _turn(img: np.ndarray, swap: bool, sign_x: int, sign_y: int) -> np.ndarray:
    if sign_x < 0 or sign_y < 0:
        img = cv2.flip(img, -1 if sign_x == sign_y else (1 if sign_x < 0 else 0))
    return cv2.transpose(img) if swap else img


def _matrix(
    symmetry: tuple[bool, int, int], affine: tuple[float, float, float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """float64 (2, 2) and (2,): where an output position is taken from, in coordinates from -1 to 1."""
    linear, shift = np.eye(2), np.zeros(2)
    if affine is not None:
        angle, scale, *moved = affine
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        linear = np.array([[cosine, sine], [-sine, cosine]])
        shift = -linear @ np.array(moved)
    swap, sign_x, sign_y = symmetry
    if swap:
        linear, shift = linear[::-1], shift[::-1]
    signs = np.array([sign_x, sign_y])
    return signs[:, None] * linear, signs * shift


@functools.lru_cache(maxsize=4)
def _plane(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates float32 (1, side), (side, 1) and r² + r⁴ (side, side), r in sides from the centre."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    square = (x**2 + y**2) / 4
    return x, y, square + square**2


def _radial(side: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    x, y, bulge = _plane(side)
    factor = 1 + np.float32(strength) * bulge
    return x * factor, y * factor


def _stretched(side: int, widths: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    cell = np.linspace(0, len(widths[0]), side)
    axes = []
    for of_axis in widths:
        edges = np.concatenate([[0.0], np.cumsum(of_axis)])
        axes.append((np.interp(cell, np.arange(len(edges)), edges / edges[-1]) * 2 - 1).astype(np.float32))
    return axes[0][None, :], axes[1][:, None]


class TableNoise(A.ImageOnlyTransform):
    """Adds Gaussian noise that is cut from a table of 2**20 normal numbers at a random place.

    Drawing 49,152 normal numbers for a tile of 128 pixels takes longer than decoding and warping it.

    Args:
        std_range: standard deviation as a share of full scale, from-to.
    """

    def __init__(self, std_range: tuple[float, float], p: float = 0.5):
        super().__init__(p=p)
        self.std_range = std_range

    def get_params(self) -> dict[str, Any]:
        return {"std": self.py_random.uniform(*self.std_range), "place": self.py_random.random()}

    def apply(self, img: np.ndarray, std: float, place: float, **_: Any) -> np.ndarray:
        table = _normal_numbers(max(NOISE_TABLE, 2 * img.size))
        start = int(place * (len(table) - img.size))
        noise = table[start : start + img.size] * np.float32(255 * std)
        return cv2.add(img, noise.reshape(img.shape), dtype=cv2.CV_8U)


@functools.lru_cache(maxsize=2)
def _normal_numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(count, dtype=np.float32)


class OneHole(A.ImageOnlyTransform):
    """Blackens one square of `side` pixels that lies inside the picture."""

    def __init__(self, side: int, p: float = 0.5):
        super().__init__(p=p)
        self.side = side

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        return {name: self.py_random.randint(0, of - self.side) for name, of in (("top", height), ("left", width))}

    def apply(self, img: np.ndarray, top: int, left: int, **_: Any) -> np.ndarray:
        img = img.copy()
        img[top : top + self.side, left : left + self.side] = 0
        return img
