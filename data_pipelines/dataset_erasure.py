"""A data set version once more, without the rows and pictures of erased patients.

Files of the version's own are written anew: the table, and HDF5 files in its folder. The HDF5 file and the CSV that it
was made from lie elsewhere and are the operator's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from data_pipelines.dataset_version import FORMAT_VERSION, file_sha256
from data_pipelines.hdf5_index import build_index, open_hdf5
from data_pipelines.metadata_table import QuarantinedRow
from data_pipelines.split_report import added_summary, class_counts, split_report
from modeling.schema import TaskSpec
from store.synced_files import replace_synced, sync_folder

_OWN_IMAGES = ("*.hdf5", "*.h5")
_TABLE, _FACTS, _QUARANTINE, _REPORT = "lesions.parquet", "dataset.json", "quarantine.csv", "report.json"
Pseudonym = Callable[[str], str]


@dataclass(frozen=True)
class ErasedPatients:
    """Who is to be removed from a version.

    Attributes:
        pseudonyms: their HMACs.
        pseudonym: the HMAC of a patient id as it stands in a table.
        gone: ids of production pictures of theirs that are erased.
        stored: ids of production pictures of later visits, which stay.
    """

    pseudonyms: Collection[str]
    pseudonym: Pseudonym
    gone: Collection[str] = frozenset()
    stored: Collection[str] = frozenset()


@dataclass(frozen=True)
class RewrittenVersion:
    """What is left of a version.

    Attributes:
        folder: of the new version; None where no row is left.
        digest: of the new version; None where no row is left.
        num_rows: of the new version.
        removed_rows: rows of the old one that are not in it.
        from_operator: whether some of them are of the operator's files, and not all were added out of the log.
    """

    folder: Path | None
    digest: str | None
    num_rows: int
    removed_rows: int
    from_operator: bool


def version_facts(folder: Path) -> dict[str, Any]:
    """The content of a version's dataset.json.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {folder}: {_FACTS} cannot be read: {error}") from error


def is_version(folder: Path) -> bool:
    """Whether a folder holds a finished version."""
    return (folder / _FACTS).exists()


def find_versions(folder: Path) -> list[Path]:
    """The finished versions in a data set's folder, by name; also the folder itself, where it is one."""
    found = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    return [path for path in found if is_version(path)]


def operator_images(folder: Path) -> str | None:
    """The HDF5 file that a version's pictures lie in, where it is none of the version's own."""
    images = version_facts(folder)["images"]
    return None if images is None or _is_own(folder, images) else images


def rows_of_patients(table: pd.DataFrame, task: TaskSpec, erased: ErasedPatients) -> np.ndarray:
    """bool (N,): the rows of `lesions.parquet` that are of erased patients.

    A table names patients in `context` where the task has a context group, else in `group`: by an id, whose HMAC is
    compared, or by the HMAC itself, as of production pictures.
    """
    named = table["context" if task.context_group is not None else "group"].astype(str)
    theirs = {
        value
        for value in named.unique()
        if value and (value in erased.pseudonyms or erased.pseudonym(value) in erased.pseudonyms)
    }
    # A production picture's group is its patient's pseudonym, whatever the task calls a patient.
    mask = named.isin(theirs) | table["group"].astype(str).isin(list(erased.pseudonyms))
    ids = table["id"].astype(str)
    return ((mask | ids.isin(list(erased.gone))) & ~ids.isin(list(erased.stored))).to_numpy(bool)


def rewrite_version(folder: Path, erased: ErasedPatients) -> RewrittenVersion | None:
    """Writes a version without erased patients beside the old one, which stays; None where it holds nothing of them.

    Its digest follows from the old one's and the rows that are left: an interrupted call, made again, goes on with the
    same version. Folds stay as they were. Of quarantined rows nobody knows the patient: the new version keeps their
    number by reason, not the rows.

    Raises:
        ValueError: the version cannot be read.
    """
    facts = version_facts(folder)
    task = TaskSpec.model_validate(facts["task"])
    table = pd.read_parquet(folder / _TABLE)
    theirs = rows_of_patients(table, task, erased)
    own = [path for pattern in _OWN_IMAGES for path in sorted(folder.glob(pattern))]
    if not theirs.any() and not any(_holds(path, erased.gone) for path in own):
        return None
    removed = table[theirs]
    from_operator = bool(len(removed)) and not ("added" in removed and removed["added"].all())
    table = table[~theirs].reset_index(drop=True)
    if not len(table):
        return RewrittenVersion(None, None, 0, len(removed), from_operator)
    digest = _digest(facts["digest"], table["id"])
    new = folder.parent / digest[:12]
    if not is_version(new):
        _write(folder, new, table, {**facts, "digest": digest, "erased_from": facts["digest"]}, task, own)
    elif version_facts(new)["digest"] != digest:
        raise ValueError(f"{new} holds digest {version_facts(new)['digest']}; expected {digest}; move it away")
    return RewrittenVersion(new, digest, len(table), len(removed), from_operator)


def remove_version(folder: Path) -> None:
    """Removes a version with the report beside it; what an interrupted removal left goes too."""
    aside = folder.with_name(f".erasing-{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    if folder.exists():
        # Renamed first: nobody opens half a version.
        os.rename(folder, aside)
        shutil.rmtree(aside)
    for leftover in (folder.with_name(f"{folder.name}.checks.json"), *folder.parent.glob(f".{folder.name}.*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    sync_folder(folder.parent)


def move_latest(old: Path, new: Path | None) -> None:
    """Points LATEST at the new version where it names the old one; away with it where there is none."""
    latest = old.parent / "LATEST"
    if not latest.exists() or latest.read_text(encoding="utf-8").strip() != old.name:
        return
    if new is None:
        latest.unlink()
    else:
        replace_synced(latest, f"{new.name}\n".encode())
    sync_folder(old.parent)


def _digest(old_digest: str, ids: pd.Series) -> str:
    left = hashlib.sha256("\0".join(sorted(ids.astype(str))).encode()).hexdigest()
    return hashlib.sha256(json.dumps(["erasure", FORMAT_VERSION, old_digest, left]).encode()).hexdigest()


def _is_own(folder: Path, images: str) -> bool:
    return "://" not in images and Path(images).parent == folder.resolve()


def _holds(path: Path, ids: Collection[str]) -> bool:
    if not ids:
        return False
    with open_hdf5(path) as file:
        return any(name in file for name in ids)


def _write(old: Path, new: Path, table: pd.DataFrame, facts: dict[str, Any], task: TaskSpec, own: list[Path]) -> None:
    """Writes beside the final place, syncs and renames: the old version is deleted next."""
    for leftover in new.parent.glob(f".{new.name}.*"):
        shutil.rmtree(leftover)
    if new.exists():
        shutil.rmtree(new)
    staging = new.with_name(f".{new.name}.{os.getpid()}")
    staging.mkdir()
    for path in own:
        _copy_images(path, staging / path.name, table)
    if facts["images"] is not None and _is_own(old, facts["images"]):
        copied = staging / Path(facts["images"]).name
        facts["images"] = str(new.resolve() / copied.name)
        facts |= {"images_bytes": copied.stat().st_size, "images_sha256": file_sha256(copied)}
    quarantine = pd.read_csv(old / _QUARANTINE, dtype=str, keep_default_na=False)
    rows = [QuarantinedRow(*row) for row in quarantine.itertuples(index=False, name=None)]
    facts |= {"num_rows": len(table), "class_counts": class_counts(table["label"], task)}
    table.to_parquet(staging / _TABLE, index=False)
    quarantine.iloc[:0].to_csv(staging / _QUARANTINE, index=False)
    report = split_report(table, rows, task, facts["fold_names"])
    if "added" in table:
        facts["added"] = report["added"] = added_summary(table, task)
    (staging / _REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    (staging / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for path in staging.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(staging)
    os.rename(staging, new)
    sync_folder(new.parent)


def _copy_images(source: Path, target: Path, table: pd.DataFrame) -> None:
    """Copies the pictures of the table's rows to a new file, and moves the rows' byte ranges there. In place, HDF5
    would leave the bytes of a deleted picture in the file."""
    before = build_index(source)
    wanted = set(table["id"].astype(str))
    with open_hdf5(source) as old, h5py.File(target, "w") as new:
        for name in before.ids.tolist():
            if name in wanted:
                old.copy(name, new)
        if not len(new):
            return
    after = build_index(target)
    moved = {name: place for name, *place in zip(after.ids.tolist(), after.offset, after.size, strict=True)}
    places = dict(zip(before.ids.tolist(), zip(before.offset.tolist(), before.size.tolist(), strict=True), strict=True))
    rows = [
        row
        for row, (name, offset, size) in enumerate(
            zip(table["id"].astype(str), table["offset"], table["size"], strict=True)
        )
        if name in moved and places[name] == (offset, size)
    ]
    ids = table["id"].astype(str).to_numpy()[rows]
    table.loc[rows, "offset"] = np.array([moved[name][0] for name in ids], np.int64)
    table.loc[rows, "size"] = np.array([moved[name][1] for name in ids], np.int64)
