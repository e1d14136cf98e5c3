"""Adds labelled production lesions to a data set version: finds them, joins them to the table, keeps the lineage.

In the table the byte ranges of added pictures are those of `added.hdf5` in the version's folder, and `added` tells the
rows: the base's HDF5 file is not copied, and an erasure can write the small file anew.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipelines.added_pictures import take_pictures, write_pictures
from data_pipelines.image_reader import ADDED_IMAGES
from data_pipelines.labelled_lesions import AddLabels, LabelledLesion, LabelledLesions, Pseudonym, find_labelled_lesions
from data_pipelines.metadata_table import QuarantinedRow
from data_pipelines.progress import Progress
from data_pipelines.split_report import class_counts
from modeling.schema import TaskSpec
from store.database import Store
from store.dataset_lineage import Member, finish_dataset_version, register_dataset_version
from store.image_files import ImageFiles

ACTOR = "prepare_dataset"


class NothingToAddError(ValueError):
    """No labelled lesion can be added."""


class LabelAdditions:
    """What one call of `prepare_version` adds.

    Args:
        pseudonym: the HMAC of a patient id of the base; None: its patients are not looked for.
    """

    def __init__(self, store: Store, settings: AddLabels, pseudonym: Pseudonym | None):
        self._store, self._settings, self._pseudonym = store, settings, pseudonym
        self._files = ImageFiles(settings.images_url)
        self._found = LabelledLesions([], [], {}, None)
        self.summary: dict[str, Any] = {}

    def find(self, task: TaskSpec, base: pd.DataFrame, with_images: bool, say: Callable[[str], None]) -> None:
        """Looks up the lesions for these rows of the base (id, group, context).

        Raises:
            NothingToAddError: there are none.
        """
        self._found = find_labelled_lesions(self._store, self._settings, task, base, with_images, self._pseudonym)
        found = self._found
        say(
            f"labels: {len(found.lesions)} lesions to add, {len(found.refused)} refused, {found.waiting or 'none'} wait"
        )
        if found.patients_known is None:
            say("warning: add_labels.patient_key_file is null: a patient of both may stand in two folds")
        if not found.lesions:
            reasons = dict(Counter(row.reason for row in found.refused)) | found.waiting
            raise NothingToAddError(
                f"add_labels: no labelled lesion can be added, of {reasons or 'no labels'}; "
                f"require = {self._settings.require}"
            )

    def digest(self, base_digest: str) -> str:
        """Of the version with the lesions, from its digest without them."""
        content = f"{base_digest}/{self._found.digest}/{self._settings.max_share}"
        return hashlib.sha256(content.encode()).hexdigest()

    def join(
        self, base: pd.DataFrame, base_images: str | None, task: TaskSpec, say: Callable[[str], None]
    ) -> tuple[pd.DataFrame, list[QuarantinedRow]]:
        """The base's rows and the added ones, by id, with the column `added`; and those that are left out.

        Raises:
            NothingToAddError: none is left to add.
        """
        lesions, refused, complete = self._found.lesions, list(self._found.refused), True
        hashes = np.zeros(len(lesions), np.uint64)
        if base_images is not None:
            with Progress("labelled pictures", say) as progress:
                taken = take_pictures(self._files, lesions, base, base_images, progress)
            lesions, hashes, complete = taken.lesions, taken.hashes, taken.complete
            refused += taken.refused
            if not complete:
                say("warning: too many pictures of similar hash; only the nearest were compared")
        kept, over = self._within_share(lesions, len(base))
        refused += over
        if not kept:
            reasons = dict(Counter(row.reason for row in refused))
            raise NothingToAddError(f"add_labels: none of {len(self._found.lesions)} lesions is left to add: {reasons}")
        lesions, hashes = [lesions[place] for place in kept], hashes[kept]
        added = _table(lesions, hashes, task, list(base.columns))
        table = pd.concat([base.assign(added=False), added], ignore_index=True)
        self.summary = self._summary(lesions, refused, base, task, complete)
        return table.sort_values("id", kind="stable").reset_index(drop=True), sorted(refused)

    def _within_share(self, lesions: list[LabelledLesion], num_base: int) -> tuple[list[int], list[QuarantinedRow]]:
        """Places of those that `max_share` lets in, ascending: the same while the log grows, but for the growth."""
        share = self._settings.max_share
        limit = int(share / (1.0 - share) * num_base)
        drawn = sorted(range(len(lesions)), key=lambda place: _drawn(lesions[place].prediction_id))
        over = [lesions[place].prediction_id for place in drawn[limit:]]
        detail = f"max_share = {share} of {num_base} base rows lets {limit} in"
        return sorted(drawn[:limit]), [QuarantinedRow(name, "over_max_share", detail) for name in over]

    def _summary(
        self,
        lesions: list[LabelledLesion],
        refused: list[QuarantinedRow],
        base: pd.DataFrame,
        task: TaskSpec,
        complete: bool,
    ) -> dict[str, Any]:
        counts = class_counts(pd.Series([lesion.label for lesion in lesions]), task)
        of_base = class_counts(base["label"], task)
        return {
            "rows": len(lesions),
            "class_counts": counts,
            "class_shares": _shares(counts),
            "base_class_shares": _shares(of_base),
            "states": dict(sorted(Counter(lesion.truth.state for lesion in lesions).items())),
            "refused": dict(sorted(Counter(row.reason for row in refused).items())),
            "waiting": self._found.waiting,
            "patients": len({lesion.patient_hmac for lesion in lesions} - {None}),
            "without_patient": sum(lesion.patient_hmac is None for lesion in lesions),
            "patients_in_base": self._found.patients_known,
            "all_duplicates_compared": complete,
        }

    def register(self, digest: str, base_digest: str, folder: Path, table: pd.DataFrame) -> None:
        """See `register_dataset_version`; for a finished version again too."""
        by_id = {lesion.prediction_id: lesion for lesion in self._found.lesions}
        added = [by_id[name] for name in table.loc[table["added"].to_numpy(bool), "id"]]
        members = [Member(lesion.prediction_id, lesion.label_id, lesion.patient_hmac) for lesion in added]
        path = str(folder.resolve())
        register_dataset_version(self._store, digest, path, base_digest, {"added": len(members)}, members)

    def write(self, staging: Path, table: pd.DataFrame) -> None:
        """Writes the added pictures into the folder, and their byte ranges into the table.

        Raises:
            PictureGoneError: one was removed meanwhile.
        """
        if "offset" not in table:
            return
        added = table["added"].to_numpy(bool)
        by_id = {lesion.prediction_id: lesion for lesion in self._found.lesions}
        lesions = [by_id[name] for name in table.loc[added, "id"]]
        offset, size = write_pictures(staging / ADDED_IMAGES, self._files, lesions)
        table.loc[added, "offset"], table.loc[added, "size"] = offset, size

    def finish(self, digest: str, num_rows: int) -> None:
        """See `finish_dataset_version`."""
        finish_dataset_version(self._store, digest, num_rows, ACTOR)


def sync_files(folder: Path) -> None:
    """Puts a folder's files on disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _drawn(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: round(count / total, 6) for name, count in counts.items()}


def _table(lesions: list[LabelledLesion], hashes: np.ndarray, task: TaskSpec, columns: list[str]) -> pd.DataFrame:
    """Rows like the base's, of its columns, with `added`; their byte ranges are still to be filled in."""
    own: dict[str, Any] = {
        "id": [lesion.prediction_id for lesion in lesions],
        "group": [lesion.group for lesion in lesions],
        "context": [lesion.context for lesion in lesions],
        "label": np.array([lesion.label for lesion in lesions], np.int64),
        "offset": np.zeros(len(lesions), np.int64),
        "size": np.zeros(len(lesions), np.int64),
        "perceptual_hash": hashes,
    }
    for name, spec in task.columns.items():
        values = [lesion.metadata[name] for lesion in lesions]
        own[name] = np.array(values, np.float64) if spec.kind == "numeric" else pd.Series(values, dtype="str")
    if task.institution_column is not None and task.institution_column not in own:
        own[task.institution_column] = pd.Series([lesion.institution for lesion in lesions], dtype="str")
    # What else reports ask for (a subgroup column that is no feature) the log does not know.
    missing = pd.Series([None] * len(lesions), dtype="str")
    return pd.DataFrame({name: own.get(name, missing) for name in columns}).assign(added=True)
