"""Patients with several lesions each, as a drift reference and as days of the prediction log, for tests."""

from __future__ import annotations

import numpy as np
import pandas as pd

from modeling.schema import TaskSpec
from monitoring.drift_columns import Columns, columns_of_rows
from monitoring.prediction_log import EMBEDDING_NAMES, PredictionRecord, encode_embedding, patient_hmac

QUALITY = {"brightness": 0.5, "contrast": 0.2, "blur": 2.0, "red": 0.6, "green": 0.5, "blue": 0.45}


def lesions(num_patients: int, seed: int, rows: tuple[int, int] = (4, 10), shifted: bool = False) -> pd.DataFrame:
    """One row per lesion: patient, scores, image quality, embedding, age_approx and sex.

    Half of every figure's variance lies between patients, and age and sex wholly. `shifted`: another camera (redder,
    blurred) and older patients.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(num_patients), rng.integers(rows[0], rows[1] + 1, num_patients))

    def values(mean: float = 0.0, scale: float = 1.0, size: int | None = None) -> np.ndarray:
        shape = (num_patients,) if size is None else (num_patients, size)
        between = rng.normal(size=shape)[group]
        return mean + scale * np.sqrt(0.5) * (between + rng.normal(size=between.shape))

    table = {"group": np.char.add(f"p{seed}-", group.astype(str)).astype(object)}
    table["image_score"] = 1 / (1 + np.exp(-values(-2)))
    table["risk"] = 1 / (1 + np.exp(-values(-3)))
    for name, mean in QUALITY.items():
        moved = {"red": 0.15, "blur": -1.0}.get(name, 0.0) * shifted
        table[name] = values(mean + moved, 0.3 if name == "blur" else 0.05)
    table["age_approx"] = np.clip(rng.normal(52 + 18 * shifted, 12, num_patients).round(-1), 5, 90)[group]
    table["sex"] = rng.choice(["female", "male"], num_patients)[group].astype(object)
    embeddings = values(size=len(EMBEDDING_NAMES)).astype(np.float32)
    table.update(zip(EMBEDDING_NAMES, embeddings.T, strict=True))
    return pd.DataFrame(table)


def reference(num_patients: int = 45, seed: int = 0) -> pd.DataFrame:
    """A bundle's reference table."""
    table = lesions(num_patients, seed)
    table["group"] = pd.factorize(table["group"])[0]
    table["risk_image_only"] = table["risk_none"] = table["risk"]
    return table


def records(table: pd.DataFrame, start_us: int, model_version: str = "1", **fields) -> list[PredictionRecord]:
    """The table's rows as answered requests, a second apart from `start_us`; `fields` override the record's."""
    embeddings = table[list(EMBEDDING_NAMES)].to_numpy()
    answered = []
    for index, row in enumerate(table.to_dict("records")):
        values = {
            "id": f"{row['group']}-{index}",
            "received_at": start_us + 1_000_000 * index,
            "patient_hmac": patient_hmac(row["group"], b"key"),
            "model_version": model_version,
            "context": "none",
            "metadata": {"age_approx": row["age_approx"], "sex": row["sex"]},
            "image_score": row["image_score"],
            "risk": row["risk"],
            "embedding": encode_embedding(embeddings[index]),
            **{name: row[name] for name in QUALITY},
        }
        answered.append(PredictionRecord(**values | fields))
    return answered


def columns(table: pd.DataFrame, task: TaskSpec, **fields) -> Columns:
    """The table's rows as the log's reader gives them; `meta.<name>` columns are their metadata."""
    embeddings = table[list(EMBEDDING_NAMES)].to_numpy()
    names = ["image_score", "risk", *QUALITY, "context", "institution", "device", "band", "abstained", "reasons"]
    rows = []
    for index, row in enumerate(table.to_dict("records")):
        record = PredictionRecord(
            id=f"{index}",
            received_at=index,
            patient_hmac=patient_hmac(str(row["group"]), b"key"),
            model_version="1",
            embedding=encode_embedding(embeddings[index]),
            **({"context": "none"} | {name: row[name] for name in names if name in row} | fields),
        )
        metadata = {name.removeprefix("meta."): row[name] for name in row if name.startswith("meta.")}
        rows.append({**record.to_row(), "metadata": metadata})
    return columns_of_rows(rows, task).columns
