"""Where each image's bytes lie in an ISIC-layout HDF5 file, and how to get them.

Reading by byte range is 15-45 times faster than `file[key][()]` (342k against 7.6k to 22k rows/s measured), so the
index is built once. Layouts without a contiguous offset (chunked, compressed, variable length) are read through h5py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np


@dataclass(frozen=True)
class Hdf5Index:
    """Byte ranges of the root datasets: ids str (N,), offset int64 (N,), -1 = read through h5py, size int64 (N,)."""

    path: str
    ids: np.ndarray
    offset: np.ndarray
    size: np.ndarray


def open_hdf5(path: str | Path) -> h5py.File:
    """Opens an HDF5 file for reading.

    Raises:
        ValueError: missing, unreadable, truncated or not HDF5, in one line.
    """
    if not Path(path).exists():
        raise ValueError(f"images file {path} does not exist; expected an HDF5 file with one dataset per image id")
    if Path(path).is_dir():
        raise ValueError(f"images file {path} is a folder; expected an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"images file {path} cannot be read as HDF5: {' '.join(str(error).split())}") from error


def build_index(path: str | Path) -> Hdf5Index:
    """Lists every root dataset of the file with its byte range (about 35k datasets/s)."""
    ids: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    with open_hdf5(path) as file:
        for key in _keys(file):
            try:
                item = file[key]
                if not isinstance(item, h5py.Dataset):
                    continue
                offset, size = _byte_range(item)
            except (KeyError, OSError, RuntimeError):
                # A damaged entry costs itself, not the file: reading it fails, and its id is quarantined.
                offset, size = -1, 0
            ids.append(key)
            offsets.append(offset)
            sizes.append(size)
    if not ids:
        raise ValueError(f"images file {path} holds no datasets; expected one per image id at the root")
    order = np.argsort(np.array(ids), kind="stable")
    return Hdf5Index(str(path), np.array(ids)[order], np.array(offsets)[order], np.array(sizes)[order])


def _keys(file: h5py.File) -> list[str]:
    try:
        return list(file)
    except (KeyError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"images file {file.filename} cannot be read as HDF5: {message}") from error


def _byte_range(item: h5py.Dataset) -> tuple[int, int]:
    """(offset, size) of a dataset's bytes in the file; offset -1 when they do not lie there as they are."""
    offset = item.id.get_offset() if item.ndim <= 1 else None
    # Variable-length values (kind O) store a pointer, not the bytes, at their offset.
    contiguous = offset is not None and item.dtype.kind in "SVu"
    return (int(offset) if contiguous else -1), int(item.id.get_storage_size())


def as_bytes(value: object) -> bytes:
    """Encoded bytes from whatever an HDF5 reader returned (`S<n>`, opaque void, uint8 array, variable length)."""
    if isinstance(value, str):
        value = value.encode("latin-1")
    data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
    # Values padded to one length end in NULs, which would hide a JPEG's end marker; no JPEG ends in NUL itself.
    return data.rstrip(b"\0") if data.startswith(b"\xff\xd8") else data


class ImageReader:
    """Reads encoded images by byte range, falling back to h5py. A context manager; one per task, not shared.

    Raises on `read`: KeyError for an id that is not in the file, OSError when the bytes are not there (truncated).
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._descriptor: int | None = None
        self._file: h5py.File | None = None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, image_id: str, offset: int, size: int) -> bytes:
        """Encoded bytes of one image."""
        if offset < 0:
            if self._file is None:
                self._file = open_hdf5(self.path)
            try:
                return as_bytes(self._file[image_id][()])
            except RuntimeError as error:
                raise OSError(f"image {image_id} of {self.path}: {error}") from error
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise OSError(f"image {image_id}: {len(data)} of {size} bytes at offset {offset} of {self.path}")
        return as_bytes(data)
