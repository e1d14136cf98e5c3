"""A bundle's risks for the gate split of a data set version, kept so that they are computed once.

What is kept holds risks in the order of the version's rows and no id: without the data set it tells of nobody.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipelines.image_check import save_arrays
from data_pipelines.image_dataset import DatasetVersion, open_dataset
from data_pipelines.table_scoring import fuse, image_scores
from modeling.bundle import Bundle
from modeling.metrics import risk


def find_version(location: str | Path, digest: str) -> DatasetVersion | None:
    """The version with this digest: `location` itself, one of its versions, or one beside it; None where it is not.

    Raises:
        ValueError: it is there and cannot be opened (its pictures are gone, or have changed).
    """
    place, name = Path(location), digest[:12]
    for path in (place / name, place, place.parent / name):
        if (path / "dataset.json").exists():
            version = open_dataset(path)
            if version.digest == digest:
                return version
    return None


def why_not_scored(bundle: Bundle, version: DatasetVersion) -> str:
    """What keeps a bundle from scoring a version that another model was made of; empty where nothing does."""
    if "image" in bundle.manifest.modalities and version.images_path is None:
        return "it reads pictures, and the data set has none"
    missing = [name for name in bundle.task.columns if name not in version.lesions.columns]
    if missing:
        return f"it reads {', '.join(missing)}, which the data set lacks"
    if "patient" in bundle.manifest.contexts and bundle.task.context_group != version.task.context_group:
        return f"it compares the lesions of one {bundle.task.context_group}, which the data set does not tell"
    return ""


def gate_risks(
    bundle: Bundle,
    version: DatasetVersion,
    folder: Path,
    num_scorers: int,
    start_ray: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """Context -> P(malignant) float64 (N,) of the gate split's rows, in the order of `version.gate_positions`.

    Scored as training does when it measures the gate split: float32 in ONNX Runtime, all pictures, also those that the
    abstention rule would refuse. A run that was killed goes on from the scores it kept.

    Args:
        folder: where results are kept, by bundle and data set digest.
        start_ray: called once pictures have to be scored.

    Raises:
        ValueError: a picture of the gate split cannot be read.
    """
    key = f"{bundle.digest[:16]}-{version.digest[:16]}"
    path = folder / f"{key}.npz"
    rows = len(version.gate_positions)
    kept = _kept(path, list(bundle.manifest.contexts), rows)
    if kept is not None:
        say(f"risks of {bundle.manifest.name} {bundle.digest[:12]} on the gate split are known: {path}")
        return kept
    table = version.lesions.iloc[version.gate_positions].reset_index(drop=True)
    images, parts = None, folder / f"{key}.parts"
    if "image" in bundle.manifest.modalities:
        start_ray()
        say(f"scoring the {rows} lesions of the gate split with {bundle.manifest.name} {bundle.digest[:12]}")
        assert version.images_path is not None
        scored = image_scores(
            bundle, version.images_path, version.rows(version.gate_positions), num_scorers, parts, say
        )
        if scored.errors:
            row, reason = next(iter(sorted(scored.errors.items())))
            raise ValueError(f"dataset {version.path}: gate image {table['id'].iloc[row]}: {reason}")
        images = scored.log_probabilities
    trusted = np.ones(rows, dtype=bool)
    risks = {
        context: risk(fuse(bundle, context, images, table, trusted), bundle.task)
        for context in bundle.manifest.contexts
    }
    save_arrays(path, **risks)
    shutil.rmtree(parts, ignore_errors=True)
    return risks


def _kept(path: Path, contexts: list[str], rows: int) -> dict[str, np.ndarray] | None:
    """What an earlier run saved; None for what is missing, unreadable or of another shape."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {context: arrays[context] for context in contexts}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    whole = all(risks.shape == (rows,) and np.isfinite(risks).all() for risks in found.values())
    return found if whole else None


def trained_on(version: DatasetVersion, table_of: DatasetVersion) -> np.ndarray:
    """bool (N,): gate rows of `table_of` whose picture or group is among the rows that train in `version`.

    The hash keeps a group on its side; a changed group id, or a larger `gate_fraction`, can bring it across.
    """
    gate = table_of.lesions.iloc[table_of.gate_positions]
    train = version.lesions.iloc[version.training_positions]
    return np.logical_or(*(gate[name].isin(train[name]).to_numpy() for name in ("id", "group")))
