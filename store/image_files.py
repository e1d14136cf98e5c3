"""Image files by content hash: written whole or not at all, on disk when `put` returns, stripped of metadata."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import fsspec
import numpy as np

from store.side_by_side import SideBySide
from store.synced_files import SyncedFolders, folder_lock, sync_folder, temporary_files

_JPEG_START, _PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# Inside entropy-coded data an 0xFF is followed by 0x00 or a restart marker; anything else ends the data.
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_ORIENTATION_TAG = 0x0112
SUFFIXES = (".jpg", ".png")
# Frame headers, Huffman and arithmetic tables, quantisation tables, restart interval: what a decoder needs.
_PICTURE_MARKERS = frozenset({*range(0xC0, 0xD0), 0xDB, 0xDD}) - {0xC8}
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_DROPPED = frozenset({0xDC, *range(0xE0, 0xF0), 0xFE})
# Encoders write about ten. A decoder walks the whole picture for each: a small file of many keeps it busy for hours.
_MAX_SCANS = 100


@dataclass(frozen=True)
class StoredImage:
    """An image as it will be kept: `data` without metadata, `hash` = hex SHA-256 of `data`, `suffix` .jpg or .png."""

    hash: str
    data: bytes
    suffix: str


def prepare_image(data: bytes) -> StoredImage:
    """What is kept of an uploaded picture: a JPEG without its metadata, any other format as 8-bit colour PNG.

    Raises:
        ValueError: not a picture that can be decoded.
    """
    if data[:2] == _JPEG_START:
        kept, suffix = strip_jpeg_metadata(data), ".jpg"
    else:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if picture is None:
            raise ValueError("image: not a decodable picture")
        kept, suffix = cv2.imencode(".png", picture)[1].tobytes(), ".png"
    return StoredImage(hashlib.sha256(kept).hexdigest(), kept, suffix)


def image_suffix(data: bytes) -> str:
    """`.jpg` or `.png`, told from the first bytes.

    Raises:
        ValueError: neither of them.
    """
    if data[:2] == _JPEG_START:
        return ".jpg"
    if data[:8] == _PNG_START:
        return ".png"
    raise ValueError("image is neither JPEG nor PNG; prepare_image makes one of them")


def strip_jpeg_metadata(data: bytes) -> bytes:
    """Drops EXIF, XMP, IPTC, colour profiles, thumbnails, comments and anything after the picture.

    The compressed picture is copied, not encoded again; the EXIF orientation is kept, alone, because decoders turn
    the picture by it and the model saw it turned.

    Raises:
        ValueError: not a complete JPEG, one with markers that no picture has, or with over 100 scans.
    """
    if data[:2] != _JPEG_START:
        raise ValueError("not a JPEG: no start-of-image marker")
    kept, orientation, scans, at = [], 1, 0, 2
    while True:
        # Any number of 0xFF may stand before a marker.
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if len(data) < at + 2 or data[at] != 0xFF:
            raise ValueError("JPEG is damaged or cut off before its end-of-image marker")
        marker = data[at + 1]
        if marker == 0xD9:
            break
        if marker in _ALONE:
            at += 2
            continue
        length = struct.unpack(">H", data[at + 2 : at + 4])[0] if len(data) >= at + 4 else 0
        end = at + 2 + length
        if length < 2 or end > len(data):
            raise ValueError("JPEG is damaged or cut off before its end-of-image marker")
        segment = data[at:end]
        if marker == 0xDA:
            scans += 1
            if scans > _MAX_SCANS:
                raise ValueError(f"JPEG has more than {_MAX_SCANS} scans")
            found = _SCAN_END.search(data, end)
            if found is None:
                raise ValueError("JPEG is cut off: no end-of-image marker")
            kept.append(data[at : found.start()])
            end = found.start()
        elif marker == 0xE0 and segment[4:9] == b"JFIF\0" and length >= 16:
            # JFIF's header says how pixels are shaped; its thumbnail may show what was cropped away.
            kept.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0")
        elif marker == 0xE1:
            orientation = _exif_orientation(segment[4:]) or orientation
        elif marker == 0xEE and segment[4:9] == b"Adobe" and length >= 14:
            # Tells decoders the colour transform.
            kept.append(b"\xff\xee\x00\x0e" + segment[4:16])
        elif marker in _PICTURE_MARKERS:
            kept.append(segment)
        elif marker not in _DROPPED:
            raise ValueError(f"JPEG has a marker FF{marker:02X}, which is of no picture")
        at = end
    head = _JPEG_START if orientation == 1 else _JPEG_START + _orientation_segment(orientation)
    return head + b"".join(kept) + b"\xff\xd9"


def _exif_orientation(payload: bytes) -> int | None:
    if payload[:6] != b"Exif\0\0":
        return None
    tiff = payload[6:]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    start = struct.unpack(order + "I", tiff[4:8])[0]
    if len(tiff) < start + 2:
        return None
    for index in range(struct.unpack(order + "H", tiff[start : start + 2])[0]):
        field = tiff[start + 2 + 12 * index : start + 14 + 12 * index]
        if len(field) < 12:
            return None
        tag, _, _, value = struct.unpack(order + "HHIH", field[:10])
        if tag == _ORIENTATION_TAG:
            return value if 1 <= value <= 8 else None
    return None


def _orientation_segment(orientation: int) -> bytes:
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, _ORIENTATION_TAG, 3, 1, orientation, 0, 0)
    return b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff


# Images of one call that are on their way to a bucket at the same time.
_UPLOADS = 8


class ImageFiles:
    """Images at `<url>/<first two of the hash>/<hash><suffix>`, on a local path or any fsspec URL.

    OSError where the place cannot be written or read.
    """

    def __init__(self, url: str):
        self.url = url.removeprefix("file://").rstrip("/")
        self.local = "://" not in self.url
        self._folders = SyncedFolders(Path(self.url))
        self._uploads = SideBySide(_UPLOADS, "uploads")

    def path(self, image_hash: str, suffix: str) -> str:
        return f"{self.url}/{image_hash[:2]}/{image_hash}{suffix}"

    def put(self, data: bytes, suffix: str | None = None) -> str:
        """Stores one image and returns its hash (hex SHA-256); an image that is there already is left alone."""
        return self.put_many([data], [suffix])[0]

    def put_many(self, images: Iterable[bytes], suffixes: Iterable[str | None] | None = None) -> list[str]:
        """Stores images, with as few syncs as the place allows; returns their hashes."""
        images = list(images)
        hashes = [hashlib.sha256(data).hexdigest() for data in images]
        paths = [
            self.path(image_hash, suffix or image_suffix(data))
            for image_hash, data, suffix in zip(hashes, images, suffixes or [None] * len(images), strict=True)
        ]
        if self.local:
            self._folders.write([(Path(path), data) for path, data in zip(paths, images, strict=True)])
        else:
            self._uploads.map(_write_remote, paths, images)
        return hashes

    def get(self, image_hash: str, suffix: str) -> bytes:
        """The bytes of a stored image.

        Raises:
            FileNotFoundError: no such image.
        """
        with fsspec.open(self.path(image_hash, suffix), "rb") as file:
            return file.read()

    def exists(self, image_hash: str, suffix: str) -> bool:
        """Whether this image is stored."""
        path = self.path(image_hash, suffix)
        if self.local:
            return os.path.exists(path)
        filesystem, remote = fsspec.core.url_to_fs(path)
        return filesystem.exists(remote)

    def remove(self, image_hash: str) -> bool:
        """Removes an image, whatever its suffix, and what an interrupted write left of it; False where none was.

        A bucket that keeps versions keeps the removed one: turn versioning off, or expire versions.
        """
        found = False
        for suffix in SUFFIXES:
            path = self.path(image_hash, suffix)
            if self.local:
                found |= _remove_local(Path(path))
            else:
                filesystem, remote = fsspec.core.url_to_fs(path)
                if filesystem.exists(remote):
                    filesystem.rm_file(remote)
                    found = True
        return found

    @contextmanager
    def locked(self, exclusive: bool = False) -> Iterator[None]:
        """Keeps removal apart from writing: who writes an image, then the row that names it, holds the lock shared; who
        removes an image that no row names holds it exclusive. Local paths only, between processes too.

        A URL has no lock: there, a picture that is uploaded again for another patient in the moment in which it is
        erased may lose its file.
        """
        if not self.local:
            yield
            return
        root = Path(self.url)
        root.mkdir(parents=True, exist_ok=True)
        with folder_lock(root, exclusive):
            yield


def _write_remote(url: str, data: bytes) -> None:
    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.exists(path):
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        filesystem.pipe_file(path, data)


def _remove_local(path: Path) -> bool:
    if not path.parent.exists():
        return False
    found = path.exists()
    path.unlink(missing_ok=True)
    for leftover in temporary_files(path):
        leftover.unlink(missing_ok=True)
        found = True
    if found:
        sync_folder(path.parent)
    return found
