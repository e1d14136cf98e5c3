"""Turns an HDF5 file and a metadata CSV into an immutable dataset version, named by its content.

Bad rows are quarantined with a reason, never silently dropped; the rest gets byte ranges, labels and folds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd

from data_pipelines.hdf5_index import Hdf5Index, images_bytes, images_location, open_hdf5
from data_pipelines.image_check import check_images, kept_index
from data_pipelines.label_additions import LabelAdditions, sync_files
from data_pipelines.metadata_table import QuarantinedRow, read_metadata
from data_pipelines.progress import Progress
from data_pipelines.split_report import class_counts, report_lines, split_report
from data_pipelines.stratified_folds import GATE_FOLD, assign_folds, check_groups, folds_by_value
from modeling.schema import TaskSpec
from store.dataset_lineage import PredictionsGoneError
from store.synced_files import replace_synced, sync_folder

# Part of the digest: raise it when the same input would give another table.
FORMAT_VERSION = 2
SYNTHETIC_ATTRIBUTION = "synthetic (dermray make_sample)"
TABLE = "lesions.parquet"
HASH_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class SplitSettings:
    """How rows are divided.

    Attributes:
        num_folds: cross-validation folds, stratified by class.
        gate_fraction: share of groups kept for the gate split.
        seed: shuffles the folds.
        fold_by: a column whose every value becomes a fold instead (leave-one-institution-out).
    """

    num_folds: int
    gate_fraction: float
    seed: int
    fold_by: str | None = None


def prepare_version(
    images: str | None,
    metadata: str,
    out: str,
    task: TaskSpec,
    split: SplitSettings,
    decode_check: bool,
    say: Callable[[str], None],
    additions: LabelAdditions | None = None,
) -> dict[str, Any]:
    """Writes `<out>/<digest[:12]>/` and points `<out>/LATEST` at it; an existing version of the same digest is kept.

    Without `images` every usable row is kept, and models of the version see metadata alone.

    Args:
        additions: labelled production lesions that the version has as well.

    Returns:
        {"dataset": folder, "digest", "num_rows", "num_quarantined", "class_counts", "reused": bool, ...}.

    Raises:
        ValueError: unreadable files, missing columns, no usable row, a class too small for the folds, or a group that
            spans two folds.
        PredictionsGoneError, PictureGoneError: of `additions`, some were erased meanwhile; nothing of them is left in
            `out`. Call it again.
    """
    if additions is not None and images is not None and not decode_check:
        raise ValueError("add_labels needs decode_check = true, which tells whether the base has a picture already")
    if images is not None:
        open_hdf5(images).close()
    elif not task.columns:
        raise ValueError(f"task {task.name} has no columns, and images is null: a model would see nothing")
    table, quarantine = read_metadata(metadata, task, require_labels=True)
    say(f"metadata: {len(table)} usable rows, {len(quarantine)} quarantined")
    if task.institution_column is not None and (table[task.institution_column] == SYNTHETIC_ATTRIBUTION).any():
        # Data that says it is synthetic makes the task synthetic, so that no page can show it as real.
        task = task.model_copy(update={"synthetic": True})
    if split.fold_by is not None and split.fold_by not in table:
        raise ValueError(f"fold_by = {split.fold_by!r}: expected a column that the task names, of {list(table)[4:]}")
    image_hash = {} if images is None else {"images_sha256": file_sha256(images, say)}
    hashes = {**image_hash, "metadata_sha256": file_sha256(metadata)}
    base_digest = digest = _digest(task, split, decode_check, hashes)
    if additions is not None:
        additions.find(task, table, images is not None, say)
        digest = additions.digest(base_digest)
    folder = Path(out) / digest[:12]
    # Named by what it depends on, so that another attempt goes on with it, also one with other folds.
    checked = json.dumps([FORMAT_VERSION, task.model_dump(mode="json"), hashes], sort_keys=True)
    work = Path(out) / f".preparing-{hashlib.sha256(checked.encode()).hexdigest()[:12]}"
    if (folder / "dataset.json").exists():
        facts = _reuse(folder, images, digest)
        say(f"{folder} has the same content already; nothing to do")
        if additions is not None:
            additions.register(digest, base_digest, folder, pd.read_parquet(folder / TABLE))
    else:
        if not len(table):
            raise ValueError(f"metadata file {metadata} has no usable row; {_reasons(quarantine)}")
        if images is None:
            table = table.sort_values("id", kind="stable").reset_index(drop=True)
        else:
            with Progress("index", say) as progress:
                index = kept_index(images, work, progress)
            say(f"images: {len(index.ids)} in {index.path}")
            table, quarantine = _match_images(table, quarantine, index, metadata)
            if decode_check:
                table, quarantine = _quarantine_undecodable(table, quarantine, index, metadata, work, say)
        if additions is not None:
            table, left_out = additions.join(table, images, task, say)
            quarantine = quarantine + left_out
        folds, fold_names = _folds(table, task, split, say)
        table.insert(4, "fold", folds)
        facts = {
            "task": task.model_dump(mode="json"),
            "digest": digest,
            "images": None if images is None else images_location(images),
            "images_bytes": 0 if images is None else images_bytes(images),
            **hashes,
            "num_rows": len(table),
            "num_quarantined": len(quarantine),
            "num_folds": len(fold_names),
            "fold_names": fold_names,
            "gate_fraction": split.gate_fraction,
            "class_counts": class_counts(table["label"], task),
            "seed": split.seed,
            "synthetic": task.synthetic,
        }
        report = split_report(table, quarantine, task, fold_names)
        if additions is not None:
            facts |= {"parent_digest": base_digest, "added": additions.summary}
            report["added"] = additions.summary
            # Before a picture is copied: from here on an erasure finds the version.
            additions.register(digest, base_digest, folder, table)
        _write(folder, table, quarantine, facts, report, additions)
        for line in report_lines(report):
            say(line)
        say(f"wrote {folder}: {len(table)} rows, {len(quarantine)} quarantined")
    # Also of an attempt that was killed once its version was there.
    shutil.rmtree(work, ignore_errors=True)
    if additions is not None:
        try:
            additions.finish(digest, facts["num_rows"])
        except PredictionsGoneError:
            shutil.rmtree(folder)
            raise
    replace_synced(Path(out) / "LATEST", f"{folder.name}\n".encode())
    shown = ("digest", "num_rows", "num_quarantined", "num_folds", "class_counts", "synthetic")
    added = {} if additions is None else {"added": facts["added"], "parent_digest": base_digest}
    return {"dataset": str(folder), **{name: facts[name] for name in shown}, **added}


def file_sha256(path: str | Path, say: Callable[[str], None] = lambda line: None) -> str:
    """sha256 hex of a local or remote file's bytes."""
    total = images_bytes(path)
    digest, done = hashlib.sha256(), 0
    with fsspec.open(str(path), "rb") as file, Progress(f"sha256 of {Path(path).name}", say) as progress:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return digest.hexdigest()


def _digest(task: TaskSpec, split: SplitSettings, decode_check: bool, hashes: dict[str, str]) -> str:
    content = {
        "format": FORMAT_VERSION,
        "task": task.model_dump(mode="json"),
        "split": [split.num_folds, split.gate_fraction, split.seed, split.fold_by],
        "decode_check": decode_check,
        **hashes,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reuse(folder: Path, images: str | None, digest: str) -> dict[str, Any]:
    facts = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if facts["digest"] != digest:
        raise ValueError(f"{folder} holds digest {facts['digest']}; expected {digest}; move that folder away")
    here = None if images is None else images_location(images)
    if facts["images"] != here:
        # The same bytes at another path: content and byte ranges hold, only the pointer moves.
        facts["images"] = here
        replace_synced(folder / "dataset.json", json.dumps(facts, indent=1).encode())
    return facts


def _match_images(
    table: pd.DataFrame, quarantine: list[QuarantinedRow], index: Hdf5Index, metadata: str
) -> tuple[pd.DataFrame, list[QuarantinedRow]]:
    """Adds `offset` and `size`, keeps rows whose image is there, sorts by id."""
    listed = {row.id for row in quarantine} | set(table["id"])
    extra = [image_id for image_id in index.ids.tolist() if image_id not in listed]
    quarantine = quarantine + [QuarantinedRow(i, "metadata_missing", "image without a metadata row") for i in extra]

    ids = table["id"].to_numpy(str)
    position = np.minimum(np.searchsorted(index.ids, ids), len(index.ids) - 1)
    found = index.ids[position] == ids
    if not found.any():
        raise ValueError(f"none of the {len(ids)} ids of {metadata} is in {index.path}, e.g. {str(ids[0])!r}")
    quarantine += [QuarantinedRow(str(i), "image_missing", "no image of this id") for i in ids[~found]]
    table = table[found].copy()
    table.insert(4, "offset", index.offset[position[found]].astype(np.int64))
    table.insert(5, "size", index.size[position[found]].astype(np.int64))
    return table.sort_values("id", kind="stable").reset_index(drop=True), quarantine


def _quarantine_undecodable(
    table: pd.DataFrame,
    quarantine: list[QuarantinedRow],
    index: Hdf5Index,
    metadata: str,
    work: Path,
    say: Callable[[str], None],
) -> tuple[pd.DataFrame, list[QuarantinedRow]]:
    """Decodes every picture; adds `perceptual_hash`, keeps rows whose picture decodes."""
    with Progress("decode check", say) as progress:
        check = check_images(index.path, table, work, progress)
    say(f"decode check: {len(table)} images, {len(check.failures)} undecodable")
    failed = [QuarantinedRow(str(table["id"][row]), "undecodable", check.failures[row]) for row in check.failures]
    table.insert(6, "perceptual_hash", check.hashes)
    table = table.drop(index=list(check.failures)).reset_index(drop=True)
    if not len(table):
        raise ValueError(f"no usable row is left of {metadata} and {index.path}; {_reasons(quarantine + failed)}")
    return table, quarantine + failed


def _folds(
    table: pd.DataFrame, task: TaskSpec, split: SplitSettings, say: Callable[[str], None]
) -> tuple[np.ndarray, list[str]]:
    """Fold of each row, int64 (N,), and the folds' names."""
    labels, groups = table["label"].to_numpy(np.int64), table["group"].to_numpy(str)
    if split.fold_by is None:
        folds = assign_folds(labels, groups, task.classes, split.num_folds, split.gate_fraction, split.seed)
        names = [f"fold_{fold}" for fold in range(split.num_folds)]
    else:
        folds, names = folds_by_value(table[split.fold_by], groups, split.gate_fraction, split.fold_by)
    check_groups(folds, groups, names)
    named = table["context"].to_numpy(str) != ""
    try:
        check_groups(folds[named], table.loc[named, "context"].to_numpy(str), names)
    except ValueError as error:
        # A lesion is compared with its patient's others: held out lesions would reach training by it.
        raise ValueError(
            f"task.context_group = {task.context_group!r}: {error}; give it as task.fold_group too"
        ) from error
    gate = labels[folds == GATE_FOLD]
    absent = [name for index, name in enumerate(task.classes) if not (gate == index).any()]
    if split.gate_fraction > 0 and absent:
        say(f"warning: the gate split ({len(gate)} rows) holds no row of class {absent}; its metrics will have gaps")
    return folds, names


def _reasons(quarantine: list[QuarantinedRow]) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in Counter(row.reason for row in quarantine).most_common())
    example = f", e.g. {quarantine[0].id!r}: {quarantine[0].detail}" if quarantine else ""
    return f"quarantined: {counts or 'none'}{example}"


def _write(
    folder: Path,
    table: pd.DataFrame,
    quarantine: list[QuarantinedRow],
    facts: dict[str, Any],
    report: dict[str, Any],
    additions: LabelAdditions | None,
) -> None:
    """Writes beside the final place and renames, so that a version is whole or absent."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    # Of attempts that were cut off: they may hold pictures.
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    staging.mkdir(parents=True)
    try:
        if additions is not None:
            additions.write(staging, table)
    except BaseException:
        shutil.rmtree(staging)
        raise
    table.to_parquet(staging / TABLE, index=False)
    rows = sorted(quarantine)
    pd.DataFrame(rows, columns=list(QuarantinedRow._fields)).to_csv(staging / "quarantine.csv", index=False)
    (staging / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (staging / "dataset.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if folder.exists():
        # Without dataset.json it was never a version; a finished one is reused before this point.
        shutil.rmtree(folder)
    sync_files(staging)
    sync_folder(staging)
    os.rename(staging, folder)
    sync_folder(folder.parent)
