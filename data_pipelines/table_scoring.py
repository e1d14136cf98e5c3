"""Scores a metadata table with its pictures: pass 1 streams image scores, pass 2 fuses them per patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_pipelines.batch_scoring import score_images
from data_pipelines.hdf5_datasource import ImageRows
from data_pipelines.hdf5_index import build_index
from data_pipelines.metadata_table import QuarantinedRow, read_metadata
from modeling.bundle import Bundle
from modeling.metrics import risk
from modeling.schema import TaskSpec


@dataclass
class ScoredTable:
    """`table` has isic_id, target (= risk) and, for more than two classes, a probability column per class."""

    table: pd.DataFrame
    quarantine: list[QuarantinedRow]
    context: str
    images_without_metadata: int


def metadata_arrays(table: pd.DataFrame, task: TaskSpec) -> dict[str, np.ndarray]:
    """The task's metadata columns as arrays: float64 with NaN, or objects with None for missing."""
    columns = {}
    for name, spec in task.columns.items():
        if spec.kind == "numeric":
            columns[name] = table[name].to_numpy(np.float64, na_value=np.nan)
        else:
            columns[name] = table[name].astype(object).where(table[name].notna(), None).to_numpy()
    return columns


def choose_context(bundle: Bundle, table: pd.DataFrame, wanted: str) -> str:
    """The richest context that the bundle and the table allow, or the one asked for.

    Raises:
        ValueError: the bundle lacks it, or it needs a context group that rows of the table do not have.
    """
    named = bool((table["context"] != "").all())
    if wanted == "auto":
        if "patient" in bundle.contexts and named:
            return "patient"
        return "none" if "none" in bundle.contexts else "image_only"
    if wanted not in bundle.contexts:
        raise ValueError(f"context = {wanted!r}: the model has {sorted(bundle.contexts)}")
    if wanted == "patient" and not named:
        raise ValueError(f"context = 'patient': {bundle.task.context_group} is empty in some rows")
    return wanted


def score_table(
    bundle: Bundle,
    images: str,
    metadata: str,
    context: str,
    num_scorers: int,
    on_progress: Callable[[int, int], None],
) -> ScoredTable:
    """Scores every usable row of a CSV.

    Args:
        context: "auto" or one of the bundle's contexts.

    Raises:
        ValueError: unreadable files, missing columns, or no row with a picture.
    """
    task = bundle.task
    table, quarantine = read_metadata(metadata, task, require_labels=False)
    index = build_index(images)
    location = pd.Series(np.arange(len(index.ids)), index=index.ids)
    position = location.reindex(table["id"]).to_numpy()
    found = np.isfinite(position)
    quarantine += [QuarantinedRow(str(i), "image_missing", f"not in {Path(images).name}") for i in table["id"][~found]]
    table, position = table[found].reset_index(drop=True), position[found].astype(np.int64)
    if table.empty:
        raise ValueError(f"no row of {metadata} has a picture in {images}; expected ids in column {task.id_column!r}")

    rows = ImageRows(
        index.ids[position], index.offset[position], index.size[position], np.full(len(position), -1, np.int64)
    )
    scored = score_images(
        images,
        rows,
        str(bundle.onnx_path),
        bundle.manifest.input_size,
        num_scorers=num_scorers,
        on_progress=on_progress,
    )
    for row, reason in sorted(scored.errors.items()):
        quarantine.append(QuarantinedRow(str(table["id"].iloc[row]), "undecodable", reason))
    good = np.isfinite(scored.log_probabilities).all(axis=1)
    table, log_probabilities = table[good].reset_index(drop=True), scored.log_probabilities[good]
    if table.empty:
        raise ValueError(f"no picture of {images} could be decoded: {quarantine[-1].detail}")

    used = choose_context(bundle, table, context)
    model = bundle.contexts[used]
    columns = None if used == "image_only" else metadata_arrays(table, task)
    groups = table["context"].to_numpy(str) if used == "patient" else None
    probabilities = model.predict(log_probabilities, columns, groups)
    result = pd.DataFrame({"isic_id": table["id"], "target": risk(probabilities, task)})
    if task.num_classes > 2:
        for number, name in enumerate(task.classes):
            result[name] = probabilities[:, number]
    return ScoredTable(result, quarantine, used, int(len(index.ids) - len(set(rows.ids))))
