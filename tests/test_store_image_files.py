"""Images are kept without what identifies a patient, with the very pixels the model saw."""

from __future__ import annotations

import hashlib
import io
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from store import image_files
from store.image_files import ImageFiles, prepare_image, strip_jpeg_metadata


def picture(size: int = 48) -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (size, size * 3 // 4))


def jpeg(orientation: int = 1, **options) -> bytes:
    """A JPEG that tells who, where and what was cropped away."""
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe, born 1970"
    exif[0x0112] = orientation
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", exif=exif, comment=b"ward 7", icc_profile=b"profile of camera 4711" * 9, **options)
    return buffer.getvalue() + b"a second picture behind the first"


def decoded(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 100}])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_stripped_jpeg_shows_the_same_pixels_and_tells_nothing_else(options, orientation):
    original = jpeg(orientation, **options)
    stripped = strip_jpeg_metadata(original)
    np.testing.assert_array_equal(decoded(stripped), decoded(original))
    for secret in (b"Jane", b"ward 7", b"4711", b"second picture"):
        assert secret in original and secret not in stripped
    exif = Image.open(io.BytesIO(stripped)).getexif()
    assert dict(exif) == ({} if orientation == 1 else {0x0112: 6})
    assert strip_jpeg_metadata(stripped) == stripped


def test_a_jfif_thumbnail_is_dropped():
    plain = jpeg()
    assert plain[2:4] == b"\xff\xe0"
    thumbnail = bytes(range(48))
    with_thumbnail = (
        b"\xff\xd8\xff\xe0" + (16 + 48).to_bytes(2, "big") + plain[6:18] + b"\x04\x04" + thumbnail + plain[20:]
    )
    stripped = strip_jpeg_metadata(with_thumbnail)
    assert thumbnail not in stripped
    np.testing.assert_array_equal(decoded(stripped), decoded(plain))


@pytest.mark.parametrize("cut", [1, 3, 30, 400])
def test_a_cut_off_jpeg_is_refused(cut):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "jpeg")
    with pytest.raises(ValueError, match="JPEG"):
        strip_jpeg_metadata(buffer.getvalue()[:-cut])


@pytest.mark.parametrize("marker", [0x00, 0x02, 0xBF, 0xC8, 0xD8, 0xF0])
def test_a_segment_that_is_of_no_picture_is_refused_because_decoders_disagree_where_it_ends(marker):
    data = jpeg()
    with pytest.raises(ValueError, match=f"FF{marker:02X}"):
        strip_jpeg_metadata(data[:2] + bytes([0xFF, marker, 0, 10]) + b"Jane Doe" + data[2:])


def test_every_cut_and_every_flipped_byte_ends_in_an_answer():
    data = jpeg()
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(data), 300):
        changed = bytearray(data)
        changed[position] ^= int(rng.integers(1, 256))
        for candidate in (bytes(changed), data[:position]):
            try:
                strip_jpeg_metadata(candidate)
            except ValueError:
                pass


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_other_formats_become_png_of_the_pixels_seen(suffix):
    data = cv2.imencode(suffix, picture())[1].tobytes()
    stored = prepare_image(data)
    assert stored.suffix == ".png" and stored.hash == hashlib.sha256(stored.data).hexdigest()
    np.testing.assert_array_equal(decoded(stored.data), decoded(data))


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\nrest", b"\xff\xd8"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError):
        prepare_image(data)


@pytest.fixture
def stored():
    return prepare_image(jpeg())


def test_an_image_is_stored_once_by_its_hash(tmp_path, stored):
    files = ImageFiles(str(tmp_path / "images"))
    assert files.put(stored.data) == files.put(stored.data, ".jpg") == stored.hash
    assert files.get(stored.hash, ".jpg") == stored.data
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{stored.hash}.jpg"]
    with pytest.raises(FileNotFoundError):
        files.get("0" * 64, ".jpg")


def test_file_and_folder_are_synced_before_put_returns(tmp_path, stored, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}").rsplit("/", 1)[-1]))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(image_files.os, "fsync", record_fsync)
    monkeypatch.setattr(image_files.os, "replace", record_replace)
    ImageFiles(str(tmp_path)).put(stored.data)
    assert events[0][0] == "fsync" and events[0][1].endswith(".tmp")
    assert events[1] == ("rename", f"{stored.hash}.jpg")
    assert {name for _, name in events[2:]} == {stored.hash[:2], tmp_path.name}


def test_an_interrupted_write_leaves_no_half_image(tmp_path, stored, monkeypatch):
    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(image_files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        ImageFiles(str(tmp_path)).put(stored.data)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_images_go_to_any_fsspec_url(stored):
    files = ImageFiles("memory://dermray-images")
    assert files.put(stored.data) == stored.hash
    assert files.get(stored.hash, ".jpg") == stored.data
