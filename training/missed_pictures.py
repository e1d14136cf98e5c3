"""Pictures of the missed cancers on one page, for people who may see the data: never part of a bundle or of MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.image_reader import ImageReader
from modeling.preprocessing import decode_image
from training.figures import headless_pyplot

MAX_PICTURES, COLUMNS = 48, 8


def plot_missed(path: Path, version: DatasetVersion, missed: pd.DataFrame, threshold: float, title: str) -> int:
    """Draws the missed cancers, lowest risk first, and returns how many are drawn.

    Args:
        missed: as `training.clinical_report.missed_cancers` gives it: id, class, risk.
        threshold: the risk from which a lesion counts as found.

    Raises:
        ValueError: the data set has no pictures.
        modeling.preprocessing.UndecodableImageError, OSError, KeyError: a picture cannot be read.
    """
    if version.images_path is None:
        raise ValueError(f"data set {version.digest} has no pictures to draw")
    shown = missed.head(MAX_PICTURES)
    rows = version.lesions.set_index("id").loc[shown["id"]]
    with ImageReader(version.images_path) as reader:
        encoded = reader.read_many(rows.index.to_numpy(), rows["offset"].to_numpy(), rows["size"].to_numpy())
    pictures = [decode_image(_data(value)) for value in encoded]

    pyplot = headless_pyplot()
    lines = max(1, -(-len(shown) // COLUMNS))
    figure, axes = pyplot.subplots(
        lines, COLUMNS, figsize=(1.9 * COLUMNS, 2.3 * lines + 0.7), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, row in zip(axes.flat, pictures, shown.itertuples(index=False), strict=False):
        axis.imshow(picture)
        # `class` is no attribute's name, so the columns are taken by position.
        image_id, name, risk = row
        axis.set_title(f"{image_id}\n{name}, risk {risk:.2g}", fontsize=8)
    counted = f"{len(shown)} of {len(missed)}" if len(shown) < len(missed) else str(len(missed))
    figure.suptitle(f"{title}: {counted} missed cancers of the gate split, risk below {threshold:.2g}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return len(shown)


def _data(value: Any) -> bytes:
    if isinstance(value, Exception):
        raise value
    return value
