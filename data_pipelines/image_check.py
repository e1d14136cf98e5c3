"""Decodes every picture of a data set once: which ones cannot be decoded, and a perceptual hash of the others.

Finished parts are kept in a folder, so that a check which was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_pipelines.hdf5_index import Hdf5Index, build_index
from data_pipelines.image_reader import ImageReader
from data_pipelines.perceptual_hash import THUMBNAIL, perceptual_hash, thumbnail
from modeling.preprocessing import UndecodableImageError, decode_image

PART_ROWS = 4096
WINDOW_ROWS = 1024


@dataclass(frozen=True)
class ImageCheck:
    """`failures`: row position -> reason; `hashes`: uint64 (N,), 0 where undecodable."""

    failures: dict[int, str]
    hashes: np.ndarray


def kept_index(path: str, folder: Path, on_progress: Callable[[int, int], None]) -> Hdf5Index:
    """The file's index, built unless an earlier attempt left it in `folder`.

    Raises:
        ValueError: the file cannot be read or holds no datasets.
    """
    kept = folder / "index.npz"
    if kept.exists():
        with np.load(kept) as arrays:
            return Hdf5Index(path, arrays["ids"], arrays["offset"], arrays["size"])
    index = build_index(path, on_progress)
    save_arrays(kept, ids=index.ids, offset=index.offset, size=index.size)
    return index


def check_images(
    path: str,
    table: pd.DataFrame,
    folder: Path,
    on_progress: Callable[[int, int], None],
    num_threads: int | None = None,
) -> ImageCheck:
    """Reads and decodes every picture of `table`.

    Threads are enough: reading and decoding both release the interpreter lock.

    Args:
        table: columns id, offset, size, in an order that does not change between attempts.
        folder: keeps the finished parts; for this file and table alone.
    """
    ids, offset, size = (table[name].to_numpy() for name in ("id", "offset", "size"))
    failures: dict[int, str] = {}
    hashes = np.zeros(len(table), np.uint64)
    starts = range(0, len(table), PART_ROWS)

    def check(start: int) -> tuple[int, np.ndarray, dict[int, str]]:
        kept = folder / f"decoded-{start}.npz"
        if kept.exists():
            with np.load(kept) as arrays:
                failed = {int(row): reason for row, reason in json.loads(str(arrays["failed"])).items()}
                return start, arrays["hashes"], failed
        part = slice(start, start + PART_ROWS)
        found, failed = _decode_part(path, ids[part], offset[part], size[part], start)
        save_arrays(kept, hashes=found, failed=json.dumps(failed))
        return start, found, failed

    with ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool:
        done = 0
        for start, found, failed in pool.map(check, starts):
            hashes[start : start + len(found)] = found
            failures |= failed
            done += len(found)
            on_progress(done, len(table))
    return ImageCheck(failures, hashes)


def _decode_part(
    path: str, ids: np.ndarray, offset: np.ndarray, size: np.ndarray, first_row: int
) -> tuple[np.ndarray, dict[int, str]]:
    thumbnails = np.zeros((len(ids), THUMBNAIL, THUMBNAIL), np.float32)
    failed = {}
    with ImageReader(path) as reader:
        for first, encoded in reader.windows(ids, offset, size, WINDOW_ROWS):
            for row, data in enumerate(encoded, first):
                try:
                    if isinstance(data, Exception):
                        raise data
                    thumbnails[row] = thumbnail(decode_image(data))
                except (UndecodableImageError, OSError, KeyError) as error:
                    failed[first_row + row] = " ".join(str(error).split())
    hashes = perceptual_hash(thumbnails)
    hashes[[row - first_row for row in failed]] = 0
    return hashes, failed


def save_arrays(path: Path, **arrays: object) -> None:
    """Writes an .npz, whole or absent, and on disk: a part that is there counts as done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
