"""Gets encoded images out of an HDF5 file: byte ranges of a local file or an object store, h5py where it must be."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import h5py
import numpy as np

from data_pipelines.hdf5_index import is_url, open_hdf5

ADDED_IMAGES = "added.hdf5"
"""In a data set version's folder: the labelled pictures that it adds."""
# One request to an object store takes as long as some hundred kilobytes: ranges this near are fetched together.
MAX_GAP_BYTES = 256 * 2**10
MAX_REQUEST_BYTES = 8 * 2**20
# Encoded bytes that are held at once by `windows`, whatever the pictures' size.
MAX_WINDOW_BYTES = 64 * 2**20


def as_bytes(value: object) -> bytes:
    """Encoded bytes from whatever an HDF5 reader returned (`S<n>`, opaque void, uint8 array, variable length)."""
    if isinstance(value, str):
        value = value.encode("latin-1")
    data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
    # Values padded to one length end in NULs, which would hide a JPEG's end marker; no JPEG ends in NUL itself.
    return data.rstrip(b"\0") if data.startswith(b"\xff\xd8") else data


@dataclass(frozen=True)
class JoinedFiles:
    """Two HDF5 files read as one: the byte ranges of the second begin where the first ends.

    Attributes:
        first: local path or URL; what is read through h5py (offset -1) lies here.
        first_bytes: its size, added to the offsets in the second.
        second: local path or URL.
    """

    first: str
    first_bytes: int
    second: str


class ImageReader:
    """Reads encoded images of one file, or of two joined ones. A context manager; one per task, not shared between
    processes.

    Args:
        path: local path, or URL of any store that fsspec knows.
    """

    def __init__(self, path: str | Path | JoinedFiles):
        self._second: ImageReader | None = None
        if isinstance(path, JoinedFiles):
            self._second, self._shift = ImageReader(path.second), path.first_bytes
            path = path.first
        self.path = str(path)
        self._descriptor: int | None = None
        self._file: h5py.File | None = None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._second is not None:
            self._second.__exit__()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, image_id: str, offset: int, size: int) -> bytes:
        """Encoded bytes of one image.

        Raises:
            KeyError: an id that is not in the file.
            OSError: the bytes are not there (a file cut short, a store that does not answer).
        """
        (data,) = self.read_many(np.array([image_id]), np.array([offset]), np.array([size]))
        if isinstance(data, Exception):
            raise data
        return data

    def read_many(self, ids: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes | Exception]:
        """Encoded bytes in the order asked for, read in the file's order; what `read` would raise stands in the list.

        Args:
            ids: str (N,); offset: int64 (N,), -1 = through h5py; size: int64 (N,), bytes.
        """
        if self._second is not None and (offset >= self._shift).any():
            return self._read_both(ids, offset, size)
        found: list[bytes | Exception] = [b""] * len(ids)
        order = np.argsort(offset, kind="stable").tolist()
        ranged = [row for row in order if offset[row] >= 0]
        if is_url(self.path):
            self._read_remote(ranged, offset, size, found)
        else:
            for row in ranged:
                found[row] = self._pread(int(offset[row]), int(size[row]))
        for row in order[: len(order) - len(ranged)]:
            found[row] = self._through_h5py(str(ids[row]))
        for row in ranged:
            data = found[row]
            if not isinstance(data, Exception) and len(data) != size[row]:
                message = f"image {ids[row]}: {len(data)} of {size[row]} bytes at offset {offset[row]} of {self.path}"
                found[row] = OSError(message)
        return [data if isinstance(data, Exception) else as_bytes(data) for data in found]

    def _read_both(self, ids: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes | Exception]:
        assert self._second is not None
        found: list[bytes | Exception] = [b""] * len(ids)
        for reader, mask, shift in (
            (self, offset < self._shift, 0),
            (self._second, offset >= self._shift, self._shift),
        ):
            rows = np.flatnonzero(mask)
            read = reader.read_many(ids[rows], offset[rows] - shift, size[rows])
            for row, data in zip(rows.tolist(), read, strict=True):
                found[row] = data
        return found

    def windows(
        self, ids: np.ndarray, offset: np.ndarray, size: np.ndarray, rows: int
    ) -> Iterator[tuple[int, list[bytes | Exception]]]:
        """Yields (first row, `read_many` of it and the following ones), at most `rows` each.

        The next window is read in a thread while the caller decodes this one, which hides the latency of a disk or an
        object store.
        """
        starts = _window_starts(size, rows)
        spans = [slice(start, end) for start, end in itertools.pairwise([*starts, len(ids)])]
        with ThreadPoolExecutor(1) as background:
            ahead = None
            for number, span in enumerate(spans):
                ready = ahead or background.submit(self.read_many, ids[span], offset[span], size[span])
                if number + 1 < len(spans):
                    after = spans[number + 1]
                    ahead = background.submit(self.read_many, ids[after], offset[after], size[after])
                yield span.start, ready.result()

    def _pread(self, offset: int, size: int) -> bytes | Exception:
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            return error

    def _through_h5py(self, image_id: str) -> bytes | Exception:
        try:
            if self._file is None:
                self._file = open_hdf5(self.path)
            return as_bytes(self._file[image_id][()])
        except (KeyError, OSError, RuntimeError) as error:
            return error if isinstance(error, KeyError) else OSError(f"image {image_id} of {self.path}: {error}")

    def _read_remote(self, rows: list[int], offset: np.ndarray, size: np.ndarray, found: list) -> None:
        """Fetches the rows, which are in the file's order, with as few requests as their distances allow."""
        if not rows:
            return
        filesystem, key = fsspec.core.url_to_fs(self.path)
        requests: list[list[int]] = []
        for row in rows:
            last = requests[-1] if requests else None
            if last is not None:
                start, end = int(offset[last[0]]), int(offset[row] + size[row])
                near = offset[row] - (offset[last[-1]] + size[last[-1]]) <= MAX_GAP_BYTES
                if near and end - start <= MAX_REQUEST_BYTES:
                    last.append(row)
                    continue
            requests.append([row])
        starts = [int(offset[request[0]]) for request in requests]
        # Rows may repeat or overlap, so the last one need not end last.
        ends = [int(max(offset[row] + size[row] for row in request)) for request in requests]
        answers = filesystem.cat_ranges([key] * len(requests), starts, ends, on_error="return")
        for request, start, answer in zip(requests, starts, answers, strict=True):
            for row in request:
                if isinstance(answer, Exception):
                    found[row] = OSError(f"{self.path}: {' '.join(str(answer).split())}")
                else:
                    first = int(offset[row]) - start
                    found[row] = answer[first : first + int(size[row])]


def _window_starts(size: np.ndarray, rows: int) -> list[int]:
    """First rows of windows of at most `rows` rows and MAX_WINDOW_BYTES (a larger picture gets its own)."""
    starts, held = [], 0
    for row, bytes_ in enumerate(size.tolist()):
        if not starts or row - starts[-1] >= rows or held + bytes_ > MAX_WINDOW_BYTES:
            starts.append(row)
            held = 0
        held += bytes_
    return starts
