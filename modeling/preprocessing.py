"""Picture in, network input out: the one copy that training, batch scoring and serving share.

Normalisation is inside the network graph, so preprocessing ends at uint8 RGB.
"""

from __future__ import annotations

import cv2
import numpy as np

# One decode per worker thread; OpenCV's own pool only adds contention when several workers share the cores.
cv2.setNumThreads(1)

MIN_PIXELS_PER_SIDE = 8
# Side of the picture that quality figures are computed on.
QUALITY_PIXELS = 128


class UndecodableImageError(ValueError):
    """The bytes are not a complete picture that can be decoded."""


def decode_image(data: bytes) -> np.ndarray:
    """Decodes JPEG, PNG or WebP bytes to uint8 RGB (H, W, 3).

    Raises:
        UndecodableImageError: empty, truncated or not a picture, or under 8 pixels a side.
    """
    if len(data) == 0:
        raise UndecodableImageError("empty image")
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:]:
        # libjpeg fills a truncated JPEG with grey and only warns; a lesion half grey must not be scored.
        raise UndecodableImageError("truncated JPEG: no end-of-image marker")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UndecodableImageError(f"not decodable: {error.err}") from error
    if image is None:
        raise UndecodableImageError("not a decodable picture")
    if min(image.shape[:2]) < MIN_PIXELS_PER_SIDE:
        raise UndecodableImageError(f"{image.shape[1]}x{image.shape[0]} pixels; at least 8 a side are needed")
    return image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 RGB (H, W, 3) to (size, size, 3): area averaging down, bilinear up."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    shrinking = height >= size and width >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


def load_image(data: bytes, size: int) -> np.ndarray:
    """Encoded bytes to the network's input, uint8 RGB (size, size, 3)."""
    return resize(decode_image(data), size)


def image_quality(image: np.ndarray, small: np.ndarray | None = None) -> dict[str, float]:
    """Simple quality figures of a uint8 RGB picture, comparable across picture sizes.

    Args:
        small: `resize(image, 128)`, for callers that have it: two thirds of the work.

    Returns:
        brightness: mean luma, 0-1; blur: log10 variance of the Laplacian at 128 x 128 (low = blurred);
        red, green, blue: channel means, 0-1; contrast: standard deviation of luma, 0-1.
    """
    small = resize(image, QUALITY_PIXELS) if small is None or small.shape[0] != QUALITY_PIXELS else small
    luma = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    red, green, blue = (float(value) / 255.0 for value in cv2.mean(small)[:3])
    sharpness = float(cv2.Laplacian(luma, cv2.CV_32F).var())
    # NumPy's mean and std of these give the same in 35 instead of 2 us.
    brightness, contrast = (float(value[0, 0]) / 255.0 for value in cv2.meanStdDev(luma))
    return {
        "brightness": brightness,
        "contrast": contrast,
        "blur": float(np.log10(sharpness + 1e-3)),
        "red": red,
        "green": green,
        "blue": blue,
    }
