"""One preprocessing: what it accepts, what it refuses, and that its figures move the right way."""

import cv2
import numpy as np
import pytest

from modeling.preprocessing import UndecodableImageError, decode_image, image_quality, load_image, resize


def picture(height=120, width=90, seed=0):
    generator = np.random.default_rng(seed)
    image = np.full((height, width, 3), (200, 150, 130), np.uint8)
    cv2.circle(image, (width // 2, height // 2), 25, (90, 50, 40), -1)
    return np.clip(image.astype(int) + generator.integers(-12, 12, image.shape), 0, 255).astype(np.uint8)


def encoded(image, suffix=".jpg"):
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_decodes_to_rgb(suffix):
    decoded = decode_image(encoded(picture(), suffix))
    assert decoded.shape == (120, 90, 3)
    # Skin is redder than it is blue: swapped channels would turn this round.
    assert decoded[5, 5, 0] > decoded[5, 5, 2] + 30


def test_a_truncated_jpeg_is_refused_rather_than_scored_half_grey():
    data = encoded(picture())
    with pytest.raises(UndecodableImageError, match="truncated"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"hello, not a picture", b"\xff\xd8\xff\xd9"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(UndecodableImageError):
        decode_image(data)


def test_a_picture_of_a_few_pixels_is_refused():
    with pytest.raises(UndecodableImageError, match="at least 8"):
        decode_image(encoded(picture(120, 90)[:4, :4], ".png"))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_resize_keeps_colour_and_gives_the_input_shape(size):
    image = picture()
    small = resize(image, size)
    assert small.shape == (size, size, 3) and small.dtype == np.uint8
    assert np.abs(small.mean((0, 1)) - image.mean((0, 1))).max() < 2


def test_load_image_is_decode_then_resize():
    data = encoded(picture())
    assert np.array_equal(load_image(data, 64), resize(decode_image(data), 64))


def test_quality_sees_blur_brightness_and_tint():
    image = picture()
    base = image_quality(image)
    assert image_quality(cv2.GaussianBlur(image, (9, 9), 3))["blur"] < base["blur"] - 0.5
    assert image_quality((image * 0.5).astype(np.uint8))["brightness"] < base["brightness"] * 0.6
    tinted = image.copy()
    tinted[..., 2] = np.clip(tinted[..., 2].astype(int) + 40, 0, 255)
    assert image_quality(tinted)["blue"] > base["blue"] + 0.1
