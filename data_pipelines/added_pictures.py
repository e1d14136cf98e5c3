"""Pictures of labelled lesions out of the image store: which of them a data set version takes, and their HDF5 file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from data_pipelines.hdf5_index import build_index
from data_pipelines.image_reader import ImageReader
from data_pipelines.labelled_lesions import LabelledLesion
from data_pipelines.metadata_table import QuarantinedRow
from data_pipelines.perceptual_hash import near_pairs, perceptual_hash, similarity, thumbnail
from modeling.preprocessing import UndecodableImageError, decode_image
from store.image_files import ImageFiles

# As the data test on near-duplicates compares pictures: thumbnails of this side, alike from this correlation on.
_SIDE, _ALIKE = 64, 0.98
# Pairs of near hashes that are decoded and compared, nearest first; a log of black pictures would have millions.
_MAX_COMPARED = 50_000


class PictureGoneError(Exception):
    """A picture was taken out of the image store meanwhile: its patient was erased."""


@dataclass(frozen=True)
class TakenPictures:
    """The lesions whose picture is taken, `perceptual_hash` uint64 (N,) of theirs, those that are not, and whether all
    pairs of similar hash could be compared."""

    lesions: list[LabelledLesion]
    hashes: np.ndarray
    refused: list[QuarantinedRow]
    complete: bool


def take_pictures(
    files: ImageFiles,
    lesions: Sequence[LabelledLesion],
    base: pd.DataFrame,
    base_images: str,
    on_progress: Callable[[int, int], None],
) -> TakenPictures:
    """Refuses pictures that are gone (`image_missing`), are not what their name says (`image_damaged`), cannot be
    decoded (`undecodable`), or show what a picture of the base or of another group shows (`duplicate_of_base`,
    `duplicate_picture`): in another fold it would be a leak.

    Args:
        base: id, offset, size and perceptual_hash.
        base_images: the base's HDF5 file.
        on_progress: called with (pictures looked at, pictures in total).
    """
    read: list[LabelledLesion] = []
    refused: list[QuarantinedRow] = []
    small, thumbnails = [], []
    for number, lesion in enumerate(lesions, start=1):
        try:
            picture = decode_image(read_picture(files, lesion))
            small.append(thumbnail(picture))
            thumbnails.append(thumbnail(picture, _SIDE))
            read.append(lesion)
        except PictureGoneError:
            refused.append(QuarantinedRow(lesion.prediction_id, "image_missing", "its picture is no longer kept"))
        except UndecodableImageError as error:
            refused.append(QuarantinedRow(lesion.prediction_id, "undecodable", " ".join(str(error).split())))
        except ValueError as error:
            refused.append(QuarantinedRow(lesion.prediction_id, "image_damaged", str(error)))
        on_progress(number, len(lesions))
    hashes = perceptual_hash(np.stack(small)) if small else np.zeros(0, np.uint64)
    twins, complete = _twins(read, hashes, thumbnails, base, base_images)
    refused += list(twins.values())
    left = [place for place in range(len(read)) if place not in twins]
    return TakenPictures([read[place] for place in left], hashes[left], refused, complete)


def read_picture(files: ImageFiles, lesion: LabelledLesion) -> bytes:
    """The stored bytes of a lesion's picture.

    Raises:
        PictureGoneError: it is no longer kept.
        ValueError: the file is damaged.
    """
    assert lesion.image is not None
    try:
        data = files.get(*lesion.image)
    except FileNotFoundError as error:
        raise PictureGoneError(f"the picture of prediction {lesion.prediction_id} is no longer kept") from error
    if hashlib.sha256(data).hexdigest() != lesion.image[0]:
        raise ValueError("the stored file is not the picture that was stored")
    return data


def _twins(
    lesions: Sequence[LabelledLesion],
    hashes: np.ndarray,
    thumbnails: Sequence[np.ndarray],
    base: pd.DataFrame,
    base_images: str,
) -> tuple[dict[int, QuarantinedRow], bool]:
    """Places of pictures that are refused: any that shows what one of the base shows, and of two that show the same in
    different groups, the later."""
    num_base = len(base)
    _, groups = np.unique([lesion.group for lesion in lesions], return_inverse=True)
    parts = np.concatenate([np.zeros(num_base, np.int64), groups.astype(np.int64) + 1])
    near = near_pairs(np.concatenate([base["perceptual_hash"].to_numpy(np.uint64), hashes]), parts)
    found: dict[int, QuarantinedRow] = {}
    columns = [base[name].tolist() for name in ("id", "offset", "size")]
    with ImageReader(base_images) as reader:
        for pair in near.pairs[:_MAX_COMPARED].tolist():
            # Rows of the base come first, and a pair's first is the lower: of the base, or both are added.
            first, second = (place - num_base for place in pair)
            if first in found or second in found:
                continue
            if first < 0:
                data = reader.read(*(column[pair[0]] for column in columns))
                same = hashlib.sha256(data).hexdigest() == (lesions[second].image or ("",))[0]
                same = same or similarity(thumbnail(decode_image(data), _SIDE), thumbnails[second]) >= _ALIKE
                later, reason, shown = second, "duplicate_of_base", columns[0][pair[0]]
            else:
                same = similarity(thumbnails[first], thumbnails[second]) >= _ALIKE
                earlier, later = sorted((first, second), key=lambda place: _order(lesions[place]))
                reason, shown = "duplicate_picture", lesions[earlier].prediction_id
            if same:
                found[later] = QuarantinedRow(lesions[later].prediction_id, reason, f"shows the same as {shown}")
    return found, near.complete and len(near.pairs) <= _MAX_COMPARED


def _order(lesion: LabelledLesion) -> tuple[int, str]:
    return lesion.received_at, lesion.prediction_id


def write_pictures(path: Path, files: ImageFiles, lesions: Sequence[LabelledLesion]) -> tuple[np.ndarray, np.ndarray]:
    """Writes the lesions' pictures as an HDF5 file in the base's layout, on disk when it returns.

    Returns:
        offset int64 (N,) and size int64 (N,) of each lesion's picture in it.

    Raises:
        PictureGoneError: one was removed since `take_pictures` looked at it.
    """
    with h5py.File(path, "w") as file:
        for lesion in lesions:
            file.create_dataset(lesion.prediction_id, data=np.void(read_picture(files, lesion)))
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    if not lesions:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    index = build_index(path)
    places = np.searchsorted(index.ids, [lesion.prediction_id for lesion in lesions])
    return index.offset[places].astype(np.int64), index.size[places].astype(np.int64)
