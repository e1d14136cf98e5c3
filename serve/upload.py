"""What an uploaded file is, told from its first bytes, and what it may cost, before anything is decoded."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal

from serve.errors import ApiError
from serve.settings import UploadLimits

ImageFormat = Literal["jpeg", "png", "webp"]

# Frame headers of baseline, extended and progressive pictures with Huffman codes. No browser shows the others
# (lossless, hierarchical, arithmetic codes), so no one could review them.
_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
# DHT, DAC, DQT, DRI, APP0-APP15 and COM, which may come before the frame header, all with a length. Of any other marker
# decoders disagree where the next one is: libjpeg takes 0xFF00 for garbage of two bytes, and would read a frame header
# from inside what is skipped here.
_JPEG_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})


def sniff_format(data: bytes) -> ImageFormat | None:
    """JPEG, PNG or WebP by signature; None for anything else, whatever the file's name or declared type."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def read_dimensions(data: bytes, image_format: ImageFormat) -> tuple[int, int] | None:
    """(width, height) in pixels from the header alone; None where the header is damaged or cut off."""
    try:
        return {"jpeg": _jpeg_dimensions, "png": _png_dimensions, "webp": _webp_dimensions}[image_format](data)
    except struct.error:
        return None


def check_upload(data: bytes, limits: UploadLimits) -> ImageFormat:
    """Lets an image file pass that is cheap enough to decode.

    Raises:
        ApiError: 413 too many bytes or pixels, 415 not JPEG, PNG or WebP, 422 empty or without a readable header.
    """
    if not data:
        raise ApiError(422, "undecodable_image", "image: the file is empty")
    if len(data) > limits.max_image_bytes:
        raise ApiError(
            413, "too_large", f"image: {len(data)} bytes; expected at most {limits.max_image_bytes} (max_image_bytes)"
        )
    image_format = sniff_format(data)
    if image_format is None:
        raise ApiError(415, "unsupported_media_type", "image: not a JPEG, PNG or WebP file")
    dimensions = read_dimensions(data, image_format)
    if dimensions is None or min(dimensions) < 1:
        kinds = "; expected a baseline or progressive one with Huffman codes" if image_format == "jpeg" else ""
        raise ApiError(422, "undecodable_image", f"image: no size in the {image_format.upper()} header{kinds}")
    width, height = dimensions
    if width * height > limits.max_pixels:
        raise ApiError(
            413, "too_many_pixels", f"image: {width}x{height} pixels; expected at most {limits.max_pixels} (max_pixels)"
        )
    if image_format == "png" and not _png_is_whole(data):
        raise ApiError(422, "undecodable_image", "image: the PNG is damaged or cut off")
    return image_format


def check_batch(images: Sequence[bytes], limits: UploadLimits) -> None:
    """Lets the images of one request pass that are affordable together; each is still to be checked by itself.

    Raises:
        ApiError: 413 too many images or pixels.
    """
    if len(images) > limits.max_batch_images:
        raise ApiError(
            413,
            "too_large",
            f"images: {len(images)} files; expected at most {limits.max_batch_images} (max_batch_images)",
        )
    pixels = 0
    for data in images:
        image_format = sniff_format(data)
        width, height = (image_format and read_dimensions(data, image_format)) or (0, 0)
        # A picture over its own limit is refused alone, and costs nothing.
        pixels += width * height if width * height <= limits.max_pixels else 0
    if pixels > limits.max_batch_pixels:
        raise ApiError(
            413,
            "too_many_pixels",
            f"images: {pixels} pixels together; expected at most {limits.max_batch_pixels} (max_batch_pixels)",
        )


def _jpeg_dimensions(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 1 < len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _JPEG_ALONE:
            at += 2
        elif marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        elif marker in _JPEG_SEGMENTS:
            (length,) = struct.unpack_from(">H", data, at + 2)
            at += 2 + length
        else:
            return None
    return None


def _png_dimensions(data: bytes) -> tuple[int, int] | None:
    # The header chunk comes first, always.
    if data[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _png_is_whole(data: bytes) -> bool:
    """Whether all chunks up to the last lie inside the file: OpenCV allocates what a chunk's length says, to 2 GiB."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + length
    return False


def _webp_dimensions(data: bytes) -> tuple[int, int] | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return (width, height) if len(data) >= 30 else None
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
