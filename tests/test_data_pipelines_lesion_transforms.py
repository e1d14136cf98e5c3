"""What the transforms do to a picture with given draws, and that one seed gives the same pictures again."""

import itertools

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines.augmentation import AugmentationConfig, recipe_of
from data_pipelines.lesion_transforms import LesionWarp, OneHole, TableNoise

SIDE = 64
SYMMETRIES = list(itertools.product([False, True], [1, -1], [1, -1]))
STAY = (False, 1, 1)


def warp(image, symmetry=STAY, affine=None, radial=None, widths=None):
    transform = LesionWarp(recipe_of(AugmentationConfig(), SIDE), moves=True)
    return transform.apply(image, symmetry, affine, radial, widths)


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (9, 9), 3)


def dot(x, y):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[y - 2 : y + 3, x - 2 : x + 3] = 200
    return image


def centre_of(image):
    weight = image[..., 0].astype(float)
    y, x = np.mgrid[:SIDE, :SIDE]
    return (x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()


def test_the_symmetries_are_eight_and_lose_nothing(picture):
    results = {warp(picture, symmetry).tobytes() for symmetry in SYMMETRIES}
    turned = {np.ascontiguousarray(np.rot90(flip, k)).tobytes() for flip in (picture, picture[::-1]) for k in range(4)}
    assert results == turned and len(results) == 8


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_moves_by_nothing_equal_the_symmetry_alone(picture, symmetry):
    expected = warp(picture, symmetry).astype(int)
    evenly = [[1.0] * 5, [1.0] * 5]
    for move in ({"affine": (0.0, 1.0, 0.0, 0.0)}, {"radial": 0.0}, {"widths": evenly}):
        assert np.abs(warp(picture, symmetry, **move).astype(int) - expected).max() <= 1


def test_shift_scale_and_rotation_move_a_spot_where_they_should():
    # A tenth of the side (coordinates run over two) to the right, a twentieth up.
    x, y = centre_of(warp(dot(30, 30), affine=(0.0, 1.0, 0.2, -0.1)))
    assert x == pytest.approx(30 + 0.1 * (SIDE - 1), abs=0.1) and y == pytest.approx(30 - 0.05 * (SIDE - 1), abs=0.1)
    middle = (SIDE - 1) / 2
    x, y = centre_of(warp(dot(42, 32), affine=(0.0, 1.5, 0.0, 0.0)))
    assert x - middle == pytest.approx(1.5 * (42 - middle), abs=0.2)
    angle = np.deg2rad(30)
    x, y = centre_of(warp(dot(50, 31), affine=(angle, 1.0, 0.0, 0.0)))
    assert np.hypot(x - middle, y - middle) == pytest.approx(np.hypot(50 - middle, 31 - middle), abs=0.2)
    assert abs(np.arctan2(y - middle, x - middle)) == pytest.approx(angle, abs=0.05)


def test_borders_reflect_instead_of_turning_black(picture):
    bright = np.clip(picture, 100, 255)
    assert warp(bright, affine=(0.25, 0.9, 0.2, 0.2)).min() >= 99
    assert warp(bright, affine=(0.25, 0.9, 0.2, 0.2), radial=0.3).min() >= 99


def test_a_distortion_moves_the_middle_ring_and_keeps_the_centre():
    middle = (SIDE - 1) / 2
    for strength, inward in ((0.9, True), (-0.9, False)):
        near = centre_of(warp(dot(32, 32), radial=strength))
        assert near[0] == pytest.approx(32, abs=0.3)
        # Not farther out, where the reflected border would show the spot a second time.
        x, _ = centre_of(warp(dot(46, 32), radial=strength))
        assert (x < 46 - 0.5) if inward else (x > 46 + 0.5)
    # The first of five columns is twice as wide as the others in the source, so everything moves left.
    x, y = centre_of(warp(dot(32, 32), widths=[[2, 1, 1, 1, 1], [1.0] * 5]))
    assert x < middle - 3 and y == pytest.approx(32, abs=0.2)


@pytest.mark.parametrize("symmetry", [STAY, (True, -1, 1)])
def test_one_resampling_equals_torch_on_the_documented_coordinates(picture, symmetry):
    angle, scale, right, down = affine = (0.2, 1.05, 0.1, -0.06)
    strength = 0.25
    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    square = (x**2 + y**2) / 4
    x, y = (part * (1 + strength * (square + square**2)) for part in (x, y))
    x, y = x - right, y - down
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    x, y = cosine * x + sine * y, cosine * y - sine * x
    swap, sign_x, sign_y = symmetry
    if swap:
        x, y = y, x
    grid = torch.stack([sign_x * x, sign_y * y], dim=-1)[None]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    expected = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=True)[0].permute(1, 2, 0).numpy()
    ours = warp(picture, symmetry, affine, radial=strength)
    # OpenCV rounds source positions to 1/32 pixel.
    assert np.abs(ours - expected).mean() < 0.5 and np.abs(ours - expected).max() < 5


def test_noise_has_the_asked_spread_and_is_another_for_the_next_picture():
    grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
    augment = A.Compose([TableNoise((0.04, 0.04), p=1.0)], seed=0)
    first, second = (augment(image=grey)["image"].astype(float) - 128 for _ in range(2))
    for noise in (first, second):
        assert noise.std() == pytest.approx(0.04 * 255, rel=0.03) and abs(noise.mean()) < 0.3
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert (grey == 128).all()


def test_noise_fits_pictures_larger_than_the_table():
    large = np.full((700, 700, 3), 128, np.uint8)
    assert TableNoise((0.02, 0.02)).apply(large, std=0.02, place=0.999).std() == pytest.approx(5.1, rel=0.05)


def test_a_hole_is_one_black_square_that_may_touch_every_border():
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    augment = A.Compose([OneHole(16, p=1.0)], seed=0)
    corners = set()
    for _ in range(600):
        rows, columns = np.nonzero((augment(image=white)["image"] == 0).all(axis=-1))
        assert len(rows) == 16 * 16
        assert np.ptp(rows) == np.ptp(columns) == 15
        corners.add((rows.min(), columns.min()))
    tops = {top for top, _ in corners}
    assert min(tops) == 0 and max(tops) == SIDE - 16
    assert (white == 255).all()


def test_draws_stay_within_the_recipe_and_are_as_frequent_as_it_says():
    recipe = recipe_of(AugmentationConfig(), SIDE)
    transform = LesionWarp(recipe, moves=True)
    transform.set_random_seed(0)
    draws = [transform.get_params() for _ in range(4000)]
    moved = [draw["affine"] for draw in draws if draw["affine"] is not None]
    assert len(moved) / 4000 == pytest.approx(recipe.affine_p, abs=0.03)
    assert max(abs(angle) for angle, *_ in moved) <= np.deg2rad(recipe.rotate)
    assert min(scale for _, scale, *_ in moved) >= 1 - recipe.scale
    assert max(abs(part) for _, _, *shift in moved for part in shift) <= 2 * recipe.shift
    radial = np.mean([draw["radial"] is not None for draw in draws])
    by_grid = np.mean([draw["widths"] is not None for draw in draws])
    assert radial == pytest.approx(recipe.distortion_p / 2, abs=0.03) and by_grid == pytest.approx(radial, abs=0.03)
    assert all(draw["radial"] is None or draw["widths"] is None for draw in draws)
    light = LesionWarp(recipe, moves=False)
    assert all(draw["affine"] is None and draw["radial"] is None for draw in (light.get_params() for _ in range(50)))
