"""An upload is judged by its bytes, and its cost is known before it is decoded."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest

from serve.errors import ApiError
from serve.settings import UploadLimits
from serve.upload import check_upload, read_dimensions, sniff_format
from tests.bundle_factory import lesion_image
from tests.hostile_uploads import hidden_frame

LIMITS = UploadLimits()


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def jpeg_with_thumbnail(width: int, height: int) -> bytes:
    """A JPEG whose first segment holds a whole small JPEG, as EXIF thumbnails do."""
    picture = cv2.imencode(".jpg", np.zeros((height, width, 3), np.uint8))[1].tobytes()
    thumbnail = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    return picture[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + picture[2:]


@pytest.mark.parametrize(("suffix", "name"), [(".jpg", "jpeg"), (".png", "png"), (".webp", "webp")])
@pytest.mark.parametrize(("width", "height"), [(61, 61), (239, 120), (1000, 17)])
def test_format_and_size_come_from_the_bytes(suffix, name, width, height):
    data = cv2.imencode(suffix, np.full((height, width, 3), 128, np.uint8))[1].tobytes()
    assert sniff_format(data) == name
    assert read_dimensions(data, name) == (width, height)
    assert check_upload(data, LIMITS) == name


def test_lossless_and_progressive_files_have_their_size_read_too():
    image = np.full((33, 77, 3), 90, np.uint8)
    lossless = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    progressive = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert read_dimensions(lossless, "webp") == (77, 33)
    assert read_dimensions(progressive, "jpeg") == (77, 33)


def test_a_thumbnail_inside_a_jpeg_is_not_taken_for_the_picture():
    assert read_dimensions(jpeg_with_thumbnail(300, 200), "jpeg") == (300, 200)


@pytest.mark.parametrize(
    ("data", "status", "error"),
    [
        (b"", 422, "undecodable_image"),
        (b"GIF89a" + bytes(50), 415, "unsupported_media_type"),
        (b"%PDF-1.7" + bytes(50), 415, "unsupported_media_type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_media_type"),
        (b"II*\0" + bytes(50), 415, "unsupported_media_type"),
        (b"BM" + bytes(60), 415, "unsupported_media_type"),
        (b"RIFF\x10\0\0\0WAVEfmt " + bytes(20), 415, "unsupported_media_type"),
        (bytes(100), 415, "unsupported_media_type"),
        (b"\xff\xd8\xff", 422, "undecodable_image"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", 422, "undecodable_image"),
        (b"\xff\xd8\xff\xc0\x00", 422, "undecodable_image"),
        (b"\xff\xd8\xff\xda" + bytes(90), 422, "undecodable_image"),
        (b"\x89PNG\r\n\x1a\n", 422, "undecodable_image"),
        (png_header(0, 100), 422, "undecodable_image"),
        (b"RIFF\x10\0\0\0WEBPVP8X", 422, "undecodable_image"),
        (b"RIFF\x10\0\0\0WEBPXXXX" + bytes(30), 422, "undecodable_image"),
        (png_header(13_000, 13_000), 413, "too_many_pixels"),
        (png_header(2**31 - 1, 2**31 - 1), 413, "too_many_pixels"),
        (png_header(100, 100) + bytes(LIMITS.max_image_bytes), 413, "too_large"),
    ],
)
def test_what_is_no_affordable_picture_is_refused(data, status, error):
    with pytest.raises(ApiError) as caught:
        check_upload(data, LIMITS)
    assert (caught.value.status, caught.value.error) == (status, error)
    assert caught.value.detail.startswith("image: ")


def test_a_frame_header_that_only_the_decoder_would_see_is_no_way_around_the_limit():
    assert read_dimensions(hidden_frame(), "jpeg") is None


def test_every_cut_of_a_header_is_refused_or_read_but_never_fails():
    for suffix, name in ((".jpg", "jpeg"), (".png", "png"), (".webp", "webp")):
        data = lesion_image(suffix=suffix)
        for length in range(12, min(len(data), 700)):
            assert read_dimensions(data[:length], name) in (None, (48, 48))
