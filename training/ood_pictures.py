"""Pictures that no lesion model should score: things that are no lesion, and lesions that were spoilt.

Everything is drawn here or cut from photographs that installed libraries bring along, so the set can be made again
anywhere. `Kind.held_out` marks kinds that played no part in choosing how pictures are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from data_pipelines.synthetic_lesions import LesionAppearance, render_lesion
from modeling.preprocessing import decode_image

SIDE = 192


@dataclass(frozen=True)
class Kind:
    """One kind of unusable picture.

    Attributes:
        name: short and stable.
        strength: what was done, in words.
        make: for a picture that is no lesion: generator -> uint8 RGB (SIDE, SIDE, 3); for a spoilt lesion: picture and
            generator -> a picture of the same shape.
        held_out: not looked at while the rule was designed.
    """

    name: str
    strength: str
    make: Callable[..., np.ndarray]
    held_out: bool = False


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(0.0, 1.0, SIDE, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0.0, 255.0).astype(np.uint8)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.0, 255.0, 3).astype(np.float32)


def _mix(amount: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Picture between two colours, by `amount` (SIDE, SIDE) in 0-1."""
    return _bytes(first + (second - first) * amount[..., None])


def _fractal(rng: np.random.Generator, roughness: float) -> np.ndarray:
    """Noise with a power spectrum of 1 / frequency^(2 * roughness), scaled to 0-1, float32 (SIDE, SIDE)."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((SIDE, SIDE))) / frequency**roughness
    spectrum[0, 0] = 0.0
    values = np.fft.irfft2(spectrum, (SIDE, SIDE))
    low, high = np.quantile(values, [0.01, 0.99])
    return np.clip((values - low) / (high - low), 0.0, 1.0).astype(np.float32)


def _plain_colour(rng: np.random.Generator) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), _bytes(_colour(rng)), np.uint8)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid()
    angle = rng.uniform(0.0, np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    return _mix((ramp - ramp.min()) / np.ptp(ramp), _colour(rng), _colour(rng))


def _pixel_noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def _lens_cap(rng: np.random.Generator) -> np.ndarray:
    return _bytes(rng.normal(rng.uniform(2.0, 12.0), 3.0, (SIDE, SIDE, 3)))


def _checkerboard(rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(4, 24))
    x, y = _grid()
    board = ((x * cells).astype(int) + (y * cells).astype(int)) % 2
    return _mix(board.astype(np.float32), _colour(rng), _colour(rng))


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return _mix(_fractal(rng, 1.7), _colour(rng), _colour(rng))


def _bare_skin(rng: np.random.Generator) -> np.ndarray:
    lightness = rng.uniform(40.0, 78.0)
    skin = (lightness, rng.uniform(9.0, 18.0), rng.uniform(16.0, 28.0))
    # A lesion of the skin's own colour is none.
    nothing = LesionAppearance(diameter_mm=1.0, variegation=0.0, skin_lab=skin, lesion_lab=skin, num_hairs=2)
    return render_lesion(nothing, rng, SIDE)


def _text_page(rng: np.random.Generator) -> np.ndarray:
    page = np.full((SIDE, SIDE, 3), int(rng.integers(225, 256)), np.uint8)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    for line in range(14, SIDE, int(rng.integers(12, 20))):
        text = "".join(rng.choice(letters, 40))
        cv2.putText(page, text, (6, line), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (20, 20, 30), 1, cv2.LINE_AA)
    return page


def _bricks(rng: np.random.Generator) -> np.ndarray:
    wall = np.full((SIDE, SIDE, 3), 175.0, np.float32)
    height = int(rng.integers(14, 30))
    base = np.array([165.0, 80.0, 60.0]) + rng.normal(0.0, 15.0, 3)
    for row, top in enumerate(range(0, SIDE, height)):
        for left in range(-height * (row % 2), SIDE, 2 * height):
            brick = base + rng.normal(0.0, 12.0)
            wall[top + 2 : top + height - 1, max(left, 0) + 2 : max(left + 2 * height - 1, 0)] = brick
    return _bytes(wall * (0.8 + 0.4 * _fractal(rng, 1.0)[..., None]))


def _wood(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid()
    rings = rng.uniform(6.0, 16.0) * (x + 0.25 * _fractal(rng, 2.0) + 0.05 * y)
    grain = 0.5 + 0.35 * np.sin(2 * np.pi * rings) + 0.15 * _fractal(rng, 0.8)
    return _mix(grain, np.array([95.0, 58.0, 30.0]), np.array([205.0, 155.0, 100.0]))


def _landscape(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid()
    picture = _mix(y, np.array([90.0, 150.0, 230.0]), np.array([225.0, 235.0, 245.0])).astype(np.float32)
    hills = 0.45 + 0.2 * np.sin(2 * np.pi * (x * rng.uniform(0.5, 2.0) + rng.random()))
    grass = np.array([70.0, 130.0, 50.0]) * (0.6 + 0.8 * _fractal(rng, 0.9)[..., None])
    picture = np.where((y > hills)[..., None], grass, picture)
    for _ in range(int(rng.integers(1, 4))):
        left, top, width = (int(value) for value in rng.integers([5, 60, 25], [140, 120, 50]))
        cv2.rectangle(picture, (left, top), (left + width, SIDE - 10), [float(v) for v in _colour(rng)], -1)
        cv2.circle(picture, (left + width // 2, top), width // 3, [float(v) for v in _colour(rng)], -1)
    return _bytes(picture)


@lru_cache(maxsize=4)
def _photograph(name: str) -> np.ndarray:
    """A photograph that scikit-learn or Matplotlib brings along."""
    if name == "portrait":
        from matplotlib import cbook

        with cbook.get_sample_data("grace_hopper.jpg") as file:
            return decode_image(file.read())
    from importlib.resources import files

    return decode_image(files("sklearn.datasets.images").joinpath(f"{name}.jpg").read_bytes())


def _cut_from(name: str) -> Callable[[np.random.Generator], np.ndarray]:
    def cut(rng: np.random.Generator) -> np.ndarray:
        photograph = _photograph(name)
        side = int(rng.integers(SIDE // 2, min(photograph.shape[:2])))
        top, left = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
        part = photograph[top : top + side, left : left + side]
        return cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR)

    return cut


NON_LESIONS = (
    Kind("plain_colour", "one random colour", _plain_colour),
    Kind("gradient", "from one random colour to another", _gradient),
    Kind("pixel_noise", "independent random pixels", _pixel_noise),
    Kind("lens_cap", "black with sensor noise", _lens_cap),
    Kind("checkerboard", "4 to 23 cells in two random colours", _checkerboard),
    Kind("clouds", "fractal noise in two random colours", _clouds),
    Kind("bare_skin", "drawn skin without a lesion", _bare_skin),
    Kind("photograph_building", "parts of scikit-learn's china.jpg", _cut_from("china")),
    Kind("text_page", "lines of black print", _text_page, held_out=True),
    Kind("bricks", "a brick wall", _bricks, held_out=True),
    Kind("wood", "wood grain in skin-like browns", _wood, held_out=True),
    Kind("landscape", "drawn sky, grass and houses", _landscape, held_out=True),
    Kind("photograph_flower", "parts of scikit-learn's flower.jpg", _cut_from("flower"), held_out=True),
    Kind("photograph_person", "parts of Matplotlib's grace_hopper.jpg", _cut_from("portrait"), held_out=True),
)


def _gained(*gains: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    return lambda image, rng: _bytes(image * np.array(gains, np.float32))


def _blurred(share: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    return lambda image, rng: cv2.GaussianBlur(image, (0, 0), share * min(image.shape[:2]))


def _noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _bytes(image + rng.normal(0.0, 60.0, image.shape))


def _block(share: float, value: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    def cover(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        covered = image.copy()
        sides = [round(length * share**0.5) for length in image.shape[:2]]
        top, left = ((length - side) // 2 for length, side in zip(image.shape[:2], sides, strict=True))
        covered[top : top + sides[0], left : left + sides[1]] = value
        return covered

    return cover


def _motion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    length = max(3, round(0.15 * min(image.shape[:2])))
    kernel = np.zeros((length, length), np.float32)
    kernel[length // 2] = 1.0 / length
    turn = cv2.getRotationMatrix2D(((length - 1) / 2, (length - 1) / 2), rng.uniform(0.0, 180.0), 1.0)
    kernel = cv2.warpAffine(kernel, turn, (length, length))
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)


def _pixelated(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA), (width, height))


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 3])[1]
    return decode_image(data.tobytes())


def _grey(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


CORRUPTIONS = (
    Kind("blurred_slightly", "Gaussian, sigma 1.5 % of the short side", _blurred(0.015)),
    Kind("blurred", "Gaussian, sigma 3 % of the short side", _blurred(0.03)),
    Kind("blurred_heavily", "Gaussian, sigma 6 % of the short side", _blurred(0.06)),
    Kind("darkened", "values x 0.25", _gained(0.25)),
    Kind("overexposed", "values x 2, clipped", _gained(2.0)),
    Kind("noisy", "Gaussian noise, SD 60 of 255", _noisy),
    Kind("colour_cast", "blue x 1.6, red x 0.7", _gained(0.7, 1.0, 1.6)),
    Kind("inverted", "255 - value", lambda image, rng: 255 - image),
    Kind("cut_out", "black square over 50 % of the area", _block(0.5, 0)),
    Kind("jpeg_3", "JPEG quality 3", _jpeg, held_out=True),
    Kind("channels_swapped", "red and blue exchanged", lambda image, rng: image[..., ::-1].copy(), held_out=True),
    Kind("white_balance", "red x 0.75, blue x 1.25", _gained(0.75, 1.0, 1.25), held_out=True),
    Kind("greyscale", "no colour", _grey, held_out=True),
    Kind("covered", "grey square over 50 % of the area", _block(0.5, 128), held_out=True),
    Kind("moved", "motion blur over 15 % of the short side", _motion, held_out=True),
    Kind("pixelated", "12 x 12 pixels, enlarged", _pixelated, held_out=True),
)
