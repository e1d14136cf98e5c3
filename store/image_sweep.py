"""Removes pictures that no row names, and files of writes that never ended.

They stay behind where a process dies between a picture and its row, and where a picture came twice under one
idempotency key. An erasure finds a patient's pictures through rows, so it would never find these.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sql

from store.database import Store
from store.erasure import images_in_use, remove_unused
from store.image_files import SUFFIXES, ImageFiles
from store.synced_files import sync_folder, target_of
from store.tables import images

_PICTURE = re.compile(rf"([0-9a-f]{{64}})(?:{'|'.join(map(re.escape, SUFFIXES))})")
# Pictures looked up per query; and removed per hold of the exclusive lock, which keeps commits waiting.
_LOOKED_UP, _REMOVED = 200, 20
# More files than so many for each row of `images`, and some: the database is not the one that these pictures belong to.
_FILES_PER_ROW, _SPARE_FILES = 2, 100


@dataclass
class ImageSweep:
    """What one call did.

    Attributes:
        looked_at: pictures older than the minimum age.
        images: pictures removed.
        unfinished: temporary files removed.
        failures: files or folders that could not be removed or listed; the next sweep tries again.
        first_failure: what the system said of the first of them.
    """

    looked_at: int = 0
    images: int = 0
    unfinished: int = 0
    failures: int = 0
    first_failure: str = ""

    def _failed(self, error: OSError) -> None:
        self.failures += 1
        self.first_failure = self.first_failure or str(error)


def sweep_images(
    store: Store,
    image_files: ImageFiles,
    min_age_s: float,
    pause: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.time,
) -> ImageSweep:
    """Removes pictures older than `min_age_s` that neither a prediction nor a submission names, with their rows of
    `images`, and temporary files of that age; other files are left alone. An interrupted sweep may be run again.

    Only in a local folder. A bucket has no lock that would keep a picture from being named while it is removed:
    there, nothing is done.

    Args:
        min_age_s: longer than any request lives, whose pictures may be there before their rows.
        pause: called after every few files, to let others work; the sweep ends where it returns True.
        clock: seconds since the epoch, as in the files' mtime.

    Raises:
        ValueError: there are far more pictures than the store knows of; nothing was removed.
        StoreUnavailableError: the database does not answer; what was removed until then stays so.
    """
    result = ImageSweep()
    if not image_files.local:
        return result
    folders = [folder for number in range(256) if (folder := Path(image_files.url) / f"{number:02x}").is_dir()]
    num_pictures = 0
    for folder in folders:
        if pause():
            return result
        num_pictures += _count_pictures(folder)
    _refuse_other_store(store, image_files, num_pictures)
    written_before = clock() - min_age_s
    for folder in folders:
        if pause():
            return result
        try:
            names, unfinished = _old_files(folder, written_before)
        except OSError as error:
            result._failed(error)
            continue
        _remove_unfinished(folder, unfinished, result)
        for chunk in _chunks(names, _LOOKED_UP):
            if pause():
                return result
            result.looked_at += len(chunk)
            with store.reading() as connection:
                used = images_in_use(connection, chunk)
            _remove(store, image_files, [name for name in chunk if name not in used], result)
    return result


def _remove(store: Store, image_files: ImageFiles, names: Sequence[str], result: ImageSweep) -> None:
    for few in _chunks(names, _REMOVED):
        try:
            result.images += remove_unused(store, image_files, few)
        except OSError as error:
            if len(few) == 1:
                result._failed(error)
                continue
            # One that cannot be removed must not keep its neighbours for ever.
            for name in few:
                _remove(store, image_files, [name], result)


def _remove_unfinished(folder: Path, paths: Sequence[Path], result: ImageSweep) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
            result.unfinished += 1
        except OSError as error:
            result._failed(error)
    if paths:
        sync_folder(folder)


def _count_pictures(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(_PICTURE.fullmatch(entry.name) is not None for entry in entries)
    except OSError:
        return 0  # the sweep itself meets it again, and tells of it


def _refuse_other_store(store: Store, image_files: ImageFiles, num_pictures: int) -> None:
    """A database that is new, or another service's, names none of the pictures, which cannot be brought back."""
    with store.reading() as connection:
        num_rows = connection.execute(sql.select(sql.func.count()).select_from(images)).scalar_one()
    if num_pictures > _FILES_PER_ROW * num_rows + _SPARE_FILES:
        raise ValueError(
            f"{image_files.url} holds {num_pictures} pictures, but store {store.url} knows of {num_rows}; expected at "
            f"most {_FILES_PER_ROW} times as many and {_SPARE_FILES}, so the pictures may be another store's: none is "
            "removed"
        )


def _old_files(folder: Path, written_before: float) -> tuple[list[str], list[Path]]:
    """Hashes of pictures, in order, and temporary files of a folder that were written before this time."""
    hashes: set[str] = set()
    unfinished: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            target = target_of(entry.name)
            picture = _PICTURE.fullmatch(entry.name if target is None else target)
            if picture is None or not picture[1].startswith(folder.name) or not entry.is_file(follow_symlinks=False):
                continue
            try:
                written_at = entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue  # removed or renamed meanwhile
            if written_at >= written_before:
                continue
            if target is None:
                hashes.add(picture[1])
            else:
                unfinished.append(folder / entry.name)
    return sorted(hashes), unfinished


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
