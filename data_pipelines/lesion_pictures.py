"""Pictures of some rows of a data set in memory, as the network reads them; for work on a few thousand, without Ray."""

from __future__ import annotations

import numpy as np

from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.image_reader import ImageReader
from modeling.preprocessing import decode_image, resize


def read_pictures(version: DatasetVersion, positions: np.ndarray, input_size: int) -> np.ndarray:
    """Decoded and resized pictures uint8 (N, S, S, 3) of rows at `positions` int64 (N,), in that order.

    Raises:
        ValueError: the data set has no pictures, or one of these cannot be read.
    """
    if version.images_path is None:
        raise ValueError(f"data set {version.digest} has no pictures")
    rows = version.rows(positions)
    pictures = np.empty((len(positions), input_size, input_size, 3), np.uint8)
    with ImageReader(version.images_path) as reader:
        for number, data in enumerate(reader.read_many(rows.ids, rows.offset, rows.size)):
            if isinstance(data, Exception):
                raise ValueError(f"picture {rows.ids[number]} of data set {version.digest}: {data}")
            pictures[number] = resize(decode_image(data), input_size)
    return pictures


def drawn(positions: np.ndarray, number: int, seed: int) -> np.ndarray:
    """At most `number` of the positions (N,), drawn at random, ascending."""
    if len(positions) <= number:
        return positions
    return np.sort(np.random.default_rng(seed).choice(positions, number, replace=False))
