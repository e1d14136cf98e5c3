"""Turns an HDF5 file and a metadata CSV into an immutable dataset version, named by its content.

Bad rows are quarantined with a reason, never silently dropped; the rest gets byte ranges, labels and folds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipelines.hdf5_index import Hdf5Index, ImageReader, build_index, open_hdf5
from data_pipelines.metadata_table import QuarantinedRow, read_metadata
from data_pipelines.stratified_folds import GATE_FOLD, assign_folds
from modeling.preprocessing import UndecodableImageError, decode_image
from modeling.schema import TaskSpec

# Part of the digest: raise it when the same input would give another table.
FORMAT_VERSION = 1
SYNTHETIC_ATTRIBUTION = "synthetic (dermray make_sample)"
DECODE_CHUNK = 512
PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class SplitSettings:
    """num_folds: cross-validation folds; gate_fraction: share of groups kept for the gate; seed: shuffles the folds."""

    num_folds: int
    gate_fraction: float
    seed: int


def prepare_version(
    images: str,
    metadata: str,
    out: str,
    task: TaskSpec,
    split: SplitSettings,
    decode_check: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes `<out>/<digest[:12]>/` and points `<out>/LATEST` at it; an existing version of the same digest is kept.

    Returns:
        {"dataset": folder, "digest", "num_rows", "num_quarantined", "class_counts", "reused": bool, ...}.

    Raises:
        ValueError: unreadable files, missing columns, no usable row, or a class too small for the folds.
    """
    open_hdf5(images).close()
    table, quarantine = read_metadata(metadata, task, require_labels=True)
    say(f"metadata: {len(table)} usable rows, {len(quarantine)} quarantined")
    if task.institution_column is not None and (table[task.institution_column] == SYNTHETIC_ATTRIBUTION).any():
        # Data that says it is synthetic makes the task synthetic, so that no page can show it as real.
        task = task.model_copy(update={"synthetic": True})
    hashes = {"images_sha256": file_sha256(images), "metadata_sha256": file_sha256(metadata)}
    digest = _digest(task, split, decode_check, hashes)
    folder = Path(out) / digest[:12]
    if (folder / "dataset.json").exists():
        facts = _reuse(folder, images, digest)
        say(f"{folder} has the same content already; nothing to do")
    else:
        table, quarantine = _match_images(table, quarantine, build_index(images), metadata, decode_check, say)
        table.insert(4, "fold", _folds(table, task, split, say))
        facts = {
            "task": task.model_dump(mode="json"),
            "digest": digest,
            "images": str(Path(images).resolve()),
            "images_bytes": os.path.getsize(images),
            **hashes,
            "num_rows": len(table),
            "num_quarantined": len(quarantine),
            "num_folds": split.num_folds,
            "gate_fraction": split.gate_fraction,
            "class_counts": _class_counts(table["label"], task),
            "seed": split.seed,
            "synthetic": task.synthetic,
        }
        _write(folder, table, quarantine, facts, _report(table, quarantine, task, split))
        say(f"wrote {folder}: {len(table)} rows, {len(quarantine)} quarantined")
    _replace_text(Path(out) / "LATEST", folder.name + "\n")
    shown = ("digest", "num_rows", "num_quarantined", "num_folds", "class_counts", "synthetic")
    return {"dataset": str(folder), **{name: facts[name] for name in shown}}


def file_sha256(path: str | Path) -> str:
    """sha256 hex of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(task: TaskSpec, split: SplitSettings, decode_check: bool, hashes: dict[str, str]) -> str:
    content = {
        "format": FORMAT_VERSION,
        "task": task.model_dump(mode="json"),
        "split": [split.num_folds, split.gate_fraction, split.seed],
        "decode_check": decode_check,
        **hashes,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reuse(folder: Path, images: str, digest: str) -> dict[str, Any]:
    facts = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if facts["digest"] != digest:
        raise ValueError(f"{folder} holds digest {facts['digest']}; expected {digest}; move that folder away")
    here = str(Path(images).resolve())
    if facts["images"] != here:
        # The same bytes at another path: content and byte ranges hold, only the pointer moves.
        facts["images"] = here
        _replace_text(folder / "dataset.json", json.dumps(facts, indent=1))
    return facts


def _match_images(
    table: pd.DataFrame,
    quarantine: list[QuarantinedRow],
    index: Hdf5Index,
    metadata: str,
    decode_check: bool,
    say: Callable[[str], None],
) -> tuple[pd.DataFrame, list[QuarantinedRow]]:
    """Adds `offset` and `size`, keeps rows whose image is there and decodes, sorts by id."""
    say(f"images: {len(index.ids)} in {index.path}")
    if not len(table):
        raise ValueError(f"metadata file {metadata} has no usable row; {_reasons(quarantine)}")
    listed = {row.id for row in quarantine} | set(table["id"])
    extra = [str(image_id) for image_id in index.ids if image_id not in listed]
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
    table = table.sort_values("id", kind="stable").reset_index(drop=True)
    if decode_check:
        failures = dict(undecodable_images(index.path, table, say))
        quarantine += [QuarantinedRow(str(table["id"][row]), "undecodable", failures[row]) for row in failures]
        table = table.drop(index=list(failures)).reset_index(drop=True)
    if not len(table):
        raise ValueError(f"no usable row is left of {metadata} and {index.path}; {_reasons(quarantine)}")
    return table, quarantine


def undecodable_images(
    path: str | Path, table: pd.DataFrame, say: Callable[[str], None], num_threads: int | None = None
) -> Iterator[tuple[int, str]]:
    """Reads and decodes every picture of `table` (id, offset, size); yields (row position, reason) of those that fail.

    Threads are enough: reading and decoding both release the interpreter lock.
    """
    columns = [table[name].to_numpy() for name in ("id", "offset", "size")]

    def check(start: int) -> list[tuple[int, str]]:
        failed = []
        with ImageReader(path) as reader:
            for row in range(start, min(start + DECODE_CHUNK, len(table))):
                image_id, offset, size = (column[row] for column in columns)
                try:
                    decode_image(reader.read(str(image_id), int(offset), int(size)))
                except (UndecodableImageError, OSError, KeyError) as error:
                    failed.append((row, " ".join(str(error).split())))
        return failed

    started = last = time.monotonic()
    starts = range(0, len(table), DECODE_CHUNK)
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool:
        for number, failed in enumerate(pool.map(check, starts), start=1):
            yield from failed
            if time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                say(f"decode check: {number * DECODE_CHUNK} of {len(table)} images")
    say(f"decode check: {len(table)} images in {time.monotonic() - started:.1f} s")


def _folds(table: pd.DataFrame, task: TaskSpec, split: SplitSettings, say: Callable[[str], None]) -> np.ndarray:
    labels, groups = table["label"].to_numpy(np.int64), table["group"].to_numpy(str)
    folds = assign_folds(labels, groups, task.classes, split.num_folds, split.gate_fraction, split.seed)
    gate = labels[folds == GATE_FOLD]
    absent = [name for index, name in enumerate(task.classes) if not (gate == index).any()]
    if split.gate_fraction > 0 and absent:
        say(f"warning: the gate split ({len(gate)} rows) holds no row of class {absent}; its metrics will have gaps")
    return folds


def _class_counts(labels: pd.Series, task: TaskSpec) -> dict[str, int]:
    return {name: int((labels == index).sum()) for index, name in enumerate(task.classes)}


def _reasons(quarantine: list[QuarantinedRow]) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in Counter(row.reason for row in quarantine).most_common())
    example = f", e.g. {quarantine[0].id!r}: {quarantine[0].detail}" if quarantine else ""
    return f"quarantined: {counts or 'none'}{example}"


def _report(
    table: pd.DataFrame, quarantine: list[QuarantinedRow], task: TaskSpec, split: SplitSettings
) -> dict[str, Any]:
    parts = {"gate": GATE_FOLD} | {f"fold_{fold}": fold for fold in range(split.num_folds)}
    by_part = {}
    for name, fold in parts.items():
        rows = table[table["fold"] == fold]
        counts = _class_counts(rows["label"], task)
        by_part[name] = {"rows": len(rows), "groups": int(rows["group"].nunique()), "class_counts": counts}
    return {
        "task": task.name,
        "synthetic": task.synthetic,
        "rows": len(table),
        "groups": int(table["group"].nunique()),
        "quarantined": dict(Counter(row.reason for row in quarantine)),
        "splits": by_part,
        "missing_values": {name: int(table[name].isna().sum()) for name in task.columns},
    }


def _write(
    folder: Path,
    table: pd.DataFrame,
    quarantine: list[QuarantinedRow],
    facts: dict[str, Any],
    report: dict[str, Any],
) -> None:
    """Writes beside the final place and renames, so that a version is whole or absent."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    table.to_parquet(staging / "lesions.parquet", index=False)
    rows = sorted(quarantine)
    pd.DataFrame(rows, columns=list(QuarantinedRow._fields)).to_csv(staging / "quarantine.csv", index=False)
    (staging / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (staging / "dataset.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if folder.exists():
        # Without dataset.json it was never a version; a finished one is reused before this point.
        shutil.rmtree(folder)
    os.rename(staging, folder)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
