"""The pictures show what the latents say: size, border, colours, veil, hairs, blur and tint, on skin."""

import cv2
import numpy as np
import pytest

from data_pipelines.synthetic_lesions import (
    MAX_SIZE,
    MIN_SIZE,
    LesionAppearance,
    encode_jpeg,
    parity_images,
    random_size,
    render_lesion,
)
from modeling.preprocessing import decode_image, image_quality

PLAIN = {"num_hairs": 0, "blur": 0.3}


def tiles(count: int = 12, size: int = 96, **changes) -> np.ndarray:
    """Pictures of one appearance under other generators, uint8 (count, size, size, 3)."""
    latents = LesionAppearance(**(PLAIN | changes))
    return np.stack([render_lesion(latents, np.random.default_rng(seed), size) for seed in range(count)])


def lab(pictures: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2Lab) for picture in pictures])


def dark_share(pictures: np.ndarray) -> float:
    """Share of pixels that are clearly darker than the tile's skin."""
    lightness = lab(pictures)[..., 0]
    skin = np.median(lightness, axis=(1, 2), keepdims=True)
    return float((lightness < skin - 9).mean())


def middle(pictures: np.ndarray) -> np.ndarray:
    """Mean CIELAB of the middle ninth, (3,)."""
    third = pictures.shape[1] // 3
    return lab(pictures)[:, third:-third, third:-third].mean(axis=(0, 1, 2))


def test_the_same_generator_state_paints_the_same_bytes():
    latents = LesionAppearance(veil=0.5, variegation=0.7)
    first, again, other = (render_lesion(latents, np.random.default_rng(seed), 101) for seed in (1, 1, 2))
    assert first.dtype == np.uint8 and first.shape == (101, 101, 3)
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("size", [32, 61, 100, 239])
def test_every_size_works_with_extreme_latents(size):
    extreme = LesionAppearance(10.0, 0.3, 90.0, 1.0, 1.0, 1.0, (25, 5, 5), (4, 0, 0), 30, False, (1.2, 1.0, 0.8), 3.0)
    tiny = LesionAppearance(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, (80, 9, 16), (79, 9, 16), 0, True, (1.0, 1.0, 1.0), 0.0)
    for latents in (extreme, tiny):
        picture = render_lesion(latents, np.random.default_rng(0), size)
        assert picture.shape == (size, size, 3) and picture.std() > 0


def test_skin_has_the_colour_that_was_asked_for():
    for skin in [(72.0, 10.0, 18.0), (45.0, 14.0, 22.0)]:
        corner = lab(tiles(skin_lab=skin, diameter_mm=1.0))[:, :20, :20].mean(axis=(0, 1, 2))
        # The light falls off towards the corners.
        assert abs(corner[0] - skin[0]) < 7 and np.abs(corner[1:] - skin[1:]).max() < 3


def test_a_larger_lesion_covers_more_of_the_tile():
    small, large = dark_share(tiles(diameter_mm=2.5)), dark_share(tiles(diameter_mm=7.0))
    assert large > 3 * small


def test_a_ragged_border_has_a_longer_contour_for_its_area():
    def compactness(irregularity: float) -> float:
        values = []
        for picture in tiles(20, 160, diameter_mm=6.0, irregularity=irregularity, lesion_lab=(35.0, 18.0, 24.0)):
            lightness = cv2.GaussianBlur(lab(picture[None])[0, ..., 0], (0, 0), 1.0)
            mask = (lightness < np.median(lightness) - 10).astype(np.uint8)
            outline = max(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=cv2.contourArea)
            values.append(cv2.arcLength(outline, True) ** 2 / cv2.contourArea(outline))
        return float(np.median(values))

    assert compactness(0.9) > 1.4 * compactness(0.0)


def test_variegation_shows_as_spread_of_colour_inside():
    def spread(variegation: float) -> float:
        inside = lab(tiles(16, 96, diameter_mm=7.0, variegation=variegation))[:, 34:62, 34:62]
        return float(inside.std(axis=(1, 2)).mean())

    assert spread(0.9) > 1.5 * spread(0.0)


def test_the_veil_is_blue_grey():
    without, veiled = middle(tiles(diameter_mm=6.0)), middle(tiles(diameter_mm=6.0, veil=1.0))
    assert veiled[2] < without[2] - 6 and veiled[1] < without[1] - 2


def test_hairs_blur_tint_and_glare_show():
    plain = tiles(diameter_mm=3.0)
    hairy = tiles(diameter_mm=3.0, num_hairs=12)
    assert np.abs(hairy.astype(int) - plain).mean() > 1.0
    sharp, blurred = ([image_quality(picture)["blur"] for picture in tiles(blur=blur)] for blur in (0.3, 2.5))
    assert np.median(blurred) < np.median(sharp) - 0.2
    cold = tiles(tint=(0.85, 1.0, 1.2)).mean(axis=(0, 1, 2)) / tiles().mean(axis=(0, 1, 2))
    assert cold == pytest.approx([0.85, 1.0, 1.2], abs=0.03)
    assert np.percentile(tiles(cross_polarised=False), 99.9) > np.percentile(tiles(), 99.9) + 5


def test_tiles_have_the_official_sizes_and_about_their_bytes():
    sizes = random_size(np.random.default_rng(0), 2000)
    assert sizes.min() >= MIN_SIZE and sizes.max() <= MAX_SIZE
    assert 125 <= np.median(sizes) <= 137 and (sizes % 2 == 1).all()
    data = encode_jpeg(tiles(1, 131)[0])
    assert 1000 < len(data) < 9000
    assert decode_image(data).shape == (131, 131, 3)


def test_parity_images_are_fixed_and_all_different():
    pictures = parity_images(64, seed=0)
    assert pictures.shape == (16, 64, 64, 3) and pictures.dtype == np.uint8
    assert (pictures == parity_images(64, seed=0)).all()
    assert len({picture.tobytes() for picture in pictures}) == 16
