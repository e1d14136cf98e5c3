"""A data set of metadata alone, small enough to fit in a moment, for tests that spoil it in one way each."""

from __future__ import annotations

import numpy as np
import pandas as pd

from modeling.schema import TaskSpec

PATIENTS, EACH, GATE = 60, 6, -1
SETTINGS = {
    "name": "bad-input",
    "fold_group": "patient_id",
    "context_group": "patient_id",
    "label_column": "target",
    "columns": {"size_mm": {}, "age": {}, "site": {"kind": "categorical"}},
    "site_column": "site",
    "subgroup_columns": ["sex"],
}
BINARY = TaskSpec(**SETTINGS, classes=["benign", "malignant"], malignant=["malignant"])
FOUR = TaskSpec(**SETTINGS, classes=["bcc", "mel", "nv", "vasc"], malignant=["bcc", "mel"])


def lesions(task=BINARY, patients=PATIENTS, each=EACH, first=0):
    """Three folds and a gate split; size tells malignant from benign."""
    rng = np.random.default_rng(first)
    patient = first + np.repeat(np.arange(patients), each)
    malignant = rng.random(len(patient)) < 0.25
    label = malignant.astype(np.int64)
    if task is FOUR:
        label = np.where(malignant, rng.integers(0, 2, len(patient)), rng.integers(2, 4, len(patient)))
    return pd.DataFrame(
        {
            "id": [f"ISIC_{first:04d}{row:06d}" for row in range(len(patient))],
            "group": [f"IP_{number:06d}" for number in patient],
            "context": [f"IP_{number:06d}" for number in patient],
            "label": label,
            "fold": patient % 4 - 1,
            "size_mm": rng.normal(4 + 1.3 * malignant, 1),
            "age": rng.integers(20, 80, len(patient)).astype(float),
            "site": rng.choice(["arm", "leg"], len(patient)),
            "sex": np.where(patient % 2, "male", "female"),
        }
    )
