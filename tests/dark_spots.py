"""A data set that a network learns in a few steps: malignant lesions are dark."""

from __future__ import annotations

from pathlib import Path

import cv2
import h5py
import numpy as np

from data_pipelines.dataset_version import SplitSettings, prepare_version
from modeling.schema import TaskSpec


def prepare_dark_spots(folder: Path, num_lesions: int, lesions_per_patient: int, num_folds: int) -> str:
    """Writes 64-pixel pictures, a quarter of them malignant, and returns the prepared data set's folder."""
    generator = np.random.default_rng(0)
    lines = ["isic_id,patient_id,target"]
    with h5py.File(folder / "images.hdf5", "w") as file:
        for number in range(num_lesions):
            malignant = number % 4 == 0
            level = generator.normal(70 if malignant else 170, 12)
            pixels = np.clip(generator.normal(level, 25, (64, 64, 3)), 0, 255).astype(np.uint8)
            file[f"ISIC_{number:04d}"] = np.bytes_(cv2.imencode(".jpg", pixels)[1].tobytes())
            lines.append(f"ISIC_{number:04d},IP_{number // lesions_per_patient:03d},{int(malignant)}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    task = TaskSpec(
        name="dark-spots",
        fold_group="patient_id",
        context_group="patient_id",
        label_column="target",
        label_values=["0", "1"],
        classes=["benign", "malignant"],
        malignant=["malignant"],
    )
    result = prepare_version(
        str(folder / "images.hdf5"),
        str(folder / "metadata.csv"),
        str(folder / "out"),
        task,
        SplitSettings(num_folds=num_folds, gate_fraction=0.2, seed=0),
        True,
        lambda line: None,
    )
    return result["dataset"]
