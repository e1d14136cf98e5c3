"""The device's augmentation is the same recipe as the read task's: compared by what both do to many pictures."""

import dataclasses

import numpy as np
import pytest
import torch

from data_pipelines.augmentation import AugmentationConfig, build_augmentation, recipe_of
from data_pipelines.lesion_transforms import LesionWarp
from training.device_augmentation import DeviceAugmentation, _to_hsv, _to_rgb

CPU = torch.device("cpu")
COUNT, SIDE = 1500, 32


def on_device(recipe, images, seed=0, epoch=0, rank=0, strength=1.0):
    config = AugmentationConfig(recipe=recipe, place="device", strength=strength)
    augment = DeviceAugmentation(config, images.shape[1], CPU, seed, rank)
    augment.start_epoch(epoch)
    return augment(torch.from_numpy(images)).numpy()


def in_read_task(recipe, images):
    augment = build_augmentation(AugmentationConfig(recipe=recipe), images.shape[1], 0)
    return np.stack([augment(image) for image in images])


@pytest.fixture(scope="module")
def flat():
    return np.tile(np.array([180, 120, 100], np.uint8), (COUNT, SIDE, SIDE, 1))


@pytest.fixture(scope="module")
def corner():
    """A dark square in the upper left quarter of a bright picture."""
    images = np.full((COUNT, SIDE, SIDE, 3), 200, np.uint8)
    images[:, 4:12, 4:12] = 60
    return images


@pytest.mark.parametrize("recipe", ["light", "full"])
def test_colours_scatter_alike(recipe, flat):
    # The median over a picture: holes and noise do not count, brightness, contrast and colour do.
    both = (on_device(recipe, flat), in_read_task(recipe, flat))
    ours, theirs = (np.median(images.reshape(COUNT, -1, 3), axis=1) for images in both)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 5
    assert np.abs(ours.std(0) / theirs.std(0) - 1).max() < 0.12
    for percentile in (5, 25, 75, 95):
        assert np.abs(np.percentile(ours, percentile, axis=0) - np.percentile(theirs, percentile, axis=0)).max() < 8


def test_holes_and_noise_are_as_frequent(flat):
    ours, theirs = on_device("full", flat), in_read_task("full", flat)
    holed, noisy = ([], [])
    for images in (ours, theirs):
        black = (images == 0).all(axis=-1)
        holed.append((black.sum(axis=(1, 2)) >= 16).mean())
        inner = images.astype(float).std(axis=(1, 2)).max(axis=1)
        noisy.append(((inner > 1.5) & ~black.any(axis=(1, 2))).mean())
    assert holed[0] == pytest.approx(holed[1], abs=0.06) and holed[1] == pytest.approx(0.5, abs=0.06)
    assert noisy[0] == pytest.approx(noisy[1], abs=0.06) and noisy[1] > 0.05


def places(images):
    """Centre of the dark square, (N, 2), from the middle of the picture."""
    dark = (images.mean(axis=-1) < images.mean(axis=(1, 2, 3))[:, None, None] - 40).astype(float)
    dark[dark.sum(axis=(1, 2)) == 0, 0, 0] = 1
    axis = np.arange(SIDE) - (SIDE - 1) / 2
    weight = dark.sum(axis=(1, 2))
    return np.stack([(dark * axis[:, None]).sum((1, 2)), (dark * axis).sum((1, 2))], axis=1) / weight[:, None]


@pytest.mark.parametrize("move", ["distortion_p", "affine_p"])
def test_each_kind_of_move_alone_moves_alike(move, corner):
    still = dict.fromkeys(["brightness_p", "blur_or_noise_p", "distortion_p", "colour_p", "affine_p", "hole_p"], 0.0)
    recipe = dataclasses.replace(recipe_of(AugmentationConfig(), SIDE), **still | {move: 1.0})
    device = DeviceAugmentation(AugmentationConfig(place="device"), SIDE, CPU, 0, 0)
    device._recipe = recipe
    task = LesionWarp(recipe, moves=True)
    task.set_random_seed(0)
    ours = places(device(torch.from_numpy(corner)).numpy())
    theirs = places(np.stack([task(image=image)["image"] for image in corner]))
    # How far from the centre: the symmetries leave it alone.
    ours, theirs = (np.linalg.norm(place, axis=1) for place in (ours, theirs))
    assert theirs.std() > 0.2
    assert ours.std() == pytest.approx(theirs.std(), rel=0.12) and ours.mean() == pytest.approx(theirs.mean(), abs=0.1)


@pytest.mark.parametrize("recipe", ["light", "full"])
def test_pixels_move_alike(recipe, corner):
    ours, theirs = places(on_device(recipe, corner)), places(in_read_task(recipe, corner))
    # As often in each quarter, and scattered as far within it.
    for place in (ours, theirs):
        quarters = [((np.sign(place) == sign).all(axis=1)).mean() for sign in ([1, 1], [1, -1], [-1, 1], [-1, -1])]
        assert np.abs(np.array(quarters) - 0.25).max() < 0.06
    assert np.abs(ours).std() == pytest.approx(np.abs(theirs).std(), rel=0.15, abs=0.05)


def test_light_flips_keep_every_pixel():
    images = np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3), dtype=np.uint8)
    out = on_device("light", images, strength=0.0)
    turned = 0
    for image, result in zip(images, out, strict=True):
        symmetries = [np.rot90(flip, k) for flip in (image, image[::-1]) for k in range(4)]
        assert any(np.array_equal(result, other) for other in symmetries)
        turned += not np.array_equal(result, image)
    assert 48 <= turned < 64


def test_draws_depend_on_seed_epoch_and_rank_alone(corner):
    images = corner[:32]
    first = on_device("full", images, seed=1, epoch=2, rank=0)
    assert np.array_equal(first, on_device("full", images, seed=1, epoch=2, rank=0))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 1, "epoch": 2, "rank": 1}):
        assert not np.array_equal(first, on_device("full", images, **other))


def test_hsv_goes_there_and_back():
    rgb = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(_to_rgb(*_to_hsv(rgb)), rgb, atol=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.allclose(_to_rgb(*_to_hsv(grey)), grey, atol=1e-6)


def test_pictures_stay_uint8_of_the_same_shape_and_are_not_changed_in_place(corner):
    before = corner[:8].copy()
    out = on_device("full", corner[:8], strength=3.0)
    assert out.dtype == np.uint8 and out.shape == before.shape
    assert np.array_equal(corner[:8], before)


@pytest.mark.gpu
def test_on_a_gpu_the_same_recipe_runs_there(corner):
    augment = DeviceAugmentation(AugmentationConfig(place="device"), SIDE, torch.device("cuda"), 0, 0)
    out = augment(torch.from_numpy(corner[:64]).cuda())
    assert out.device.type == "cuda" and out.dtype == torch.uint8 and out.float().std() > 10
