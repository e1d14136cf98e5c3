"""Draws lesion tiles that look like close-ups of total-body photography. Nothing here is a real patient.

A tile shows 12 mm of skin. It is painted in CIELAB: skin with mottling, freckles and furrows, a lesion inside a
contour of harmonics, colour blobs, a blue-grey veil, hairs, glare and a light fall-off; then tint, blur and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

FIELD_OF_VIEW_MM = 12.0
MIN_SIZE, MAX_SIZE = 61, 239
_CONTOUR_STEPS = 512
# Lightness, red-green and yellow-blue of the blobs that make a lesion variegated: dark brown, black, tan, red.
_BLOB_LAB = np.array([[-13, 1, -3], [-22, 2, -2], [9, 1, 5], [2, 11, 1]], np.float32)
_VEIL_LAB = np.array([2.0, -14.0, -32.0], np.float32)


@dataclass(frozen=True)
class LesionAppearance:
    """What a picture shows.

    Attributes:
        diameter_mm: long diameter.
        axis_ratio: short over long diameter, 0-1.
        angle_deg: direction of the long axis.
        irregularity: 0 = smooth ellipse, 1 = ragged border.
        variegation: 0 = one colour, 1 = several.
        veil: 0-1, share of the blue-grey structureless veil; no metadata column shows it.
        skin_lab, lesion_lab: mean CIELAB colours.
        num_hairs: hairs that cross the tile.
        cross_polarised: False adds the glare of white light.
        tint: gains of red, green and blue.
        blur: Gaussian sigma in pixels of a 128-pixel tile.
    """

    diameter_mm: float = 4.0
    axis_ratio: float = 0.8
    angle_deg: float = 0.0
    irregularity: float = 0.2
    variegation: float = 0.2
    veil: float = 0.0
    skin_lab: tuple[float, float, float] = (62.0, 13.0, 22.0)
    lesion_lab: tuple[float, float, float] = (46.0, 18.0, 24.0)
    num_hairs: int = 3
    cross_polarised: bool = True
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    blur: float = 0.4


def render_lesion(latents: LesionAppearance, rng: np.random.Generator, size: int) -> np.ndarray:
    """Paints one tile, uint8 RGB (size, size, 3); the same latents, generator state and size give the same bytes."""
    # Planes, not pixels: most brush strokes touch lightness only, and contiguous planes are twice as fast.
    lab = np.empty((3, size, size), np.float32)
    lab[:] = np.asarray(latents.skin_lab, np.float32)[:, None, None]
    _paint_skin(lab, rng)
    _paint_freckles(lab, rng)
    _paint_lesion(lab, latents, rng)
    _paint_hairs(lab, latents, rng)
    _paint_light(lab, latents, rng)
    rgb = cv2.cvtColor(cv2.merge(list(lab)), cv2.COLOR_Lab2RGB)
    sigma = latents.blur * size / 128.0
    if sigma > 0.15:
        rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    grain = cv2.resize(_grain(rng), (size, size), interpolation=cv2.INTER_NEAREST)
    gains = np.asarray(latents.tint, np.float32) * np.float32(255.0)
    return np.clip((rgb + grain[..., None]) * gains, 0.0, 255.0).astype(np.uint8)


def encode_jpeg(image: np.ndarray, quality: int = 85) -> bytes:
    """JPEG bytes of a uint8 RGB picture."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return data.tobytes()


def random_size(rng: np.random.Generator, count: int) -> np.ndarray:
    """Tile sides as in ISIC 2024: odd, 61-239 pixels, median 131; int64 (count,)."""
    size = np.clip(131.0 * np.exp(0.17 * rng.standard_normal(count)), MIN_SIZE, MAX_SIZE)
    return (size // 2 * 2 + 1).astype(np.int64)


def parity_images(size: int, seed: int, count: int = 16) -> np.ndarray:
    """Fixed pictures of varied lesions on varied skin, uint8 (count, size, size, 3), to compare engines on."""
    rng = np.random.default_rng([seed, count])
    pictures = []
    for _ in range(count):
        lightness = rng.uniform(35.0, 75.0)
        latents = LesionAppearance(
            diameter_mm=rng.uniform(2.0, 9.0),
            axis_ratio=rng.uniform(0.5, 1.0),
            angle_deg=rng.uniform(0.0, 180.0),
            irregularity=rng.uniform(0.0, 1.0),
            variegation=rng.uniform(0.0, 1.0),
            veil=rng.uniform(0.0, 1.0),
            skin_lab=(lightness, rng.uniform(9.0, 18.0), rng.uniform(16.0, 28.0)),
            lesion_lab=(lightness - rng.uniform(6.0, 22.0), rng.uniform(14.0, 24.0), rng.uniform(18.0, 28.0)),
            num_hairs=int(rng.integers(0, 9)),
            cross_polarised=bool(rng.random() < 0.7),
        )
        pictures.append(render_lesion(latents, rng, size))
    return np.stack(pictures)


@lru_cache(maxsize=256)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in millimetres from the centre, float32 (size, size) each: x to the right, y down."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * FIELD_OF_VIEW_MM - FIELD_OF_VIEW_MM / 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Smooth noise with `rows` x `columns` bumps, about unit variance, float32 (size, size)."""
    coarse = rng.standard_normal((rows, columns or rows), np.float32) * np.float32(1.25)
    # Cubic keeps large bumps round; at fine bumps nobody sees the difference and linear is twice as fast.
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC if rows < 12 else cv2.INTER_LINEAR)


def _grain(rng: np.random.Generator) -> np.ndarray:
    """Sensor noise of a 128-pixel tile, float32 (128, 128)."""
    return np.float32(0.006) * rng.standard_normal((128, 128), np.float32)


def _window(size: int, x0: float, y0: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns within `reach` mm of a point, at least one pixel."""
    scale = size / FIELD_OF_VIEW_MM
    left, top = (int(np.clip((v - reach) * scale + size / 2, 0, size - 1)) for v in (x0, y0))
    right, bottom = (int(np.clip((v + reach) * scale + size / 2 + 1, 1, size)) for v in (x0, y0))
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))


def _spot(x: np.ndarray, y: np.ndarray, x0: float, y0: float, radius: float) -> np.ndarray:
    """Soft round spot with value 1 at its centre, float32 of the coordinates' shape; millimetres."""
    dx, dy = x[0] - np.float32(x0), y[:, 0] - np.float32(y0)
    scale = np.float32(-1.0 / radius**2)
    return np.outer(np.exp(scale * dy**2), np.exp(scale * dx**2))


def _paint_skin(lab: np.ndarray, rng: np.random.Generator) -> None:
    size = lab.shape[1]
    lightness, redness, yellowness = lab
    mottling = _noise(rng, size, 6)
    lightness += 1.5 * mottling
    lightness += 1.2 * _noise(rng, size, 20)
    lightness += 1.7 * _noise(rng, size, 48)
    # Furrows run in two directions, so the bumps are long and thin.
    lightness += 0.7 * _noise(rng, size, 34, 11)
    lightness += 0.7 * _noise(rng, size, 12, 34)
    redness += 1.2 * _noise(rng, size, 5) - 0.5 * mottling + _noise(rng, size, 26)
    yellowness += 0.9 * _noise(rng, size, 7)


def _paint_freckles(lab: np.ndarray, rng: np.random.Generator) -> None:
    size = lab.shape[1]
    x, y = _grid(size)
    for _ in range(rng.poisson(1.6)):
        x0, y0 = rng.uniform(-6.0, 6.0, 2)
        radius, depth = rng.uniform(0.2, 0.6), rng.uniform(2.0, 9.0)
        window = _window(size, x0, y0, 3 * radius)
        spot = np.float32(depth) * _spot(x[window], y[window], x0, y0, radius)
        for plane, share in zip(lab, (-1.0, 0.35, 0.25), strict=True):
            plane[window] += np.float32(share) * spot


def _paint_lesion(lab: np.ndarray, latents: LesionAppearance, rng: np.random.Generator) -> None:
    size = lab.shape[1]
    long_radius = min(latents.diameter_mm, 10.0) / 2
    short_radius = long_radius * latents.axis_ratio
    angle = np.deg2rad(latents.angle_deg)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x0, y0 = rng.normal(0.0, 0.35, 2)
    grid_x, grid_y = _grid(size)
    window = _window(size, x0, y0, 1.9 * long_radius)
    x, y = grid_x[window], grid_y[window]
    u = ((x - np.float32(x0)) * cosine + (y - np.float32(y0)) * sine) * np.float32(1 / long_radius)
    v = ((y - np.float32(y0)) * cosine - (x - np.float32(x0)) * sine) * np.float32(1 / short_radius)
    distance, theta = cv2.cartToPolar(u, v)
    contour = _contour(latents.irregularity, rng)
    steps = (theta * np.float32(_CONTOUR_STEPS / (2 * np.pi))).astype(np.int32)
    edge = contour[np.minimum(steps, _CONTOUR_STEPS - 1)]
    edge += np.float32(0.03 + 0.05 * latents.irregularity) * _noise(rng, size, 24)[window]
    softness = np.float32(rng.uniform(0.05, 0.11))
    inside = 1.0 / (1.0 + cv2.exp(np.minimum((distance - edge) / softness, 30.0)))

    # Moles are darker towards the centre and finely granular.
    shading = np.maximum(1.15 - 0.3 * distance, 0.3)
    contrast = np.asarray(latents.lesion_lab, np.float32) - np.asarray(latents.skin_lab, np.float32)
    change = [shading * value for value in contrast]
    change[0] += 1.6 * _noise(rng, size, 40)[window]
    spread = 0.55 * np.array([long_radius, short_radius])
    for _ in range(2 + int(3 * latents.variegation)):
        along, across = rng.uniform(-1.0, 1.0, 2) * spread
        bx, by = x0 + along * cosine - across * sine, y0 + along * sine + across * cosine
        blob = _spot(x, y, bx, by, short_radius * rng.uniform(0.3, 0.6))
        colour = _BLOB_LAB[rng.integers(len(_BLOB_LAB))] * np.float32(1.15 * latents.variegation)
        for plane, value in zip(change, colour, strict=True):
            plane += value * blob
    if latents.veil > 0.01:
        offset = rng.uniform(-0.3, 0.3, 2) * short_radius
        veil = np.float32(latents.veil) * _spot(x, y, x0 + offset[0], y0 + offset[1], 0.9 * short_radius)
        for plane, value in zip(change, _VEIL_LAB, strict=True):
            plane += value * veil
    for plane, delta in zip(lab, change, strict=True):
        plane[window] += inside * delta


def _contour(irregularity: float, rng: np.random.Generator) -> np.ndarray:
    """Relative radius at each of 512 directions, float32, mean about 1."""
    theta = np.arange(_CONTOUR_STEPS) * (2 * np.pi / _CONTOUR_STEPS)
    orders = np.arange(2, 11)
    # Low orders make it lopsided, high ones ragged; a little of both even in a regular mole.
    amplitude = (0.035 + 0.16 * irregularity) * rng.standard_normal(len(orders)) / orders**0.6
    phase = rng.uniform(0, 2 * np.pi, len(orders))
    radius = 1.0 + (amplitude[:, None] * np.cos(orders[:, None] * theta + phase[:, None])).sum(axis=0)
    return np.clip(radius, 0.35, 1.8).astype(np.float32)


def _paint_hairs(lab: np.ndarray, latents: LesionAppearance, rng: np.random.Generator) -> None:
    if latents.num_hairs == 0:
        return
    size = lab.shape[1]
    mask = np.zeros((size, size), np.uint8)
    direction = rng.uniform(0, np.pi)
    t = np.linspace(0.0, 1.0, 10)[:, None]
    for _ in range(latents.num_hairs):
        angle = direction + rng.normal(0.0, 0.5)
        step = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.25, 0.8) * size
        start = rng.uniform(-0.2, 1.0, 2) * size
        bend = start + step / 2 + rng.normal(0.0, 0.08, 2) * size
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * (start + step)
        strength = int(rng.uniform(90, 220))
        cv2.polylines(mask, [np.round(curve * 8).astype(np.int32)], False, strength, 1, cv2.LINE_AA, 3)
    hair = mask.astype(np.float32) * np.float32(1 / 255.0)
    # Dark hair on most tiles, grey on some.
    lab[0] += hair * np.float32(16.0 if rng.random() < 0.2 else -24.0)
    lab[1:] *= 1.0 - 0.5 * hair


def _paint_light(lab: np.ndarray, latents: LesionAppearance, rng: np.random.Generator) -> None:
    size = lab.shape[1]
    x, y = _grid(size)
    slope = rng.normal(0.0, 0.35, 2).astype(np.float32)
    fall_off = np.float32(rng.uniform(0.02, 0.1))
    across, down = slope[0] * x[0] - fall_off * x[0] ** 2, slope[1] * y[:, 0] - fall_off * y[:, 0] ** 2
    lab[0] += across
    lab[0] += down[:, None]
    if not latents.cross_polarised:
        glare = _noise(rng, size, 30) * np.maximum(_noise(rng, size, 7), 0.0)
        lab[0] += 7.0 * np.clip(glare - 1.2, 0.0, 3.0)
    np.clip(lab[0], 1.0, 99.0, out=lab[0])
