"""Seconds and memory of one drift window: reading the log, thresholds and verdicts, Evidently's report.

    python -m benchmarks.drift [--rows 20000] [--rounds 3] [--columns 36]

The window is unchanged data of patients with four lesions each, in a real store; the reference has 300 lesions of 45
patients. Prints medians over the rounds as one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from modeling.schema import TaskSpec
from monitoring.drift_report import DriftSettings, judge_window
from monitoring.evidently_report import write_evidently_report
from monitoring.prediction_log import (
    EMBEDDING_NAMES,
    QUALITY_NAMES,
    PredictionLog,
    PredictionRecord,
    encode_embedding,
    patient_hmac,
    read_window,
)

BATCH = 5_000


def lesions(rows: int, patients: int, columns: int, rng: np.random.Generator) -> pd.DataFrame:
    """Random lesions; half of every figure's variance lies between patients."""
    groups = np.sort(rng.integers(0, patients, rows))
    names = ["image_score", "risk", *QUALITY_NAMES, *EMBEDDING_NAMES, *(f"column_{i:02d}" for i in range(columns))]
    values = rng.normal(size=(patients, len(names)))[groups] + rng.normal(size=(rows, len(names)))
    return pd.DataFrame(values * np.sqrt(0.5), columns=names).assign(group=groups)


def fill(log: PredictionLog, table: pd.DataFrame, columns: list[str]) -> None:
    embeddings = table[list(EMBEDDING_NAMES)].to_numpy()
    for start in range(0, len(table), BATCH):
        part = table.iloc[start : start + BATCH].to_dict("records")
        records = [
            PredictionRecord(
                id=f"{start + index:08d}",
                received_at=start + index,
                patient_hmac=patient_hmac(str(row["group"]), b"benchmark"),
                model_version="1",
                context="none",
                metadata={name: row[name] for name in columns},
                embedding=encode_embedding(embeddings[start + index]),
                **{name: row[name] for name in ("image_score", "risk", *QUALITY_NAMES)},
            )
            for index, row in enumerate(part)
        ]
        log.write(records, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="predictions in the window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--columns", type=int, default=36, help="numeric metadata columns")
    arguments = parser.parse_args()
    os.environ.setdefault("DO_NOT_TRACK", "1")

    rng = np.random.default_rng(0)
    columns = [f"column_{index:02d}" for index in range(arguments.columns)]
    task = TaskSpec(
        name="benchmark",
        fold_group="patient_id",
        label_column="target",
        classes=["benign", "malignant"],
        malignant=["malignant"],
        columns={name: {} for name in columns},
    )
    reference = lesions(300, 45, arguments.columns, rng)
    reference["risk_none"] = reference["risk"]
    settings = DriftSettings()
    seconds: dict[str, list[float]] = {"read_s": [], "judge_s": [], "evidently_s": []}
    with tempfile.TemporaryDirectory() as folder:
        log = PredictionLog(f"sqlite:///{folder}/store.db", f"{folder}/images", f"{folder}/spool")
        fill(log, lesions(arguments.rows, max(20, arguments.rows // 4), arguments.columns, rng), columns)
        cpu = time.process_time()
        for number in range(arguments.rounds):
            moments = [time.monotonic()]
            current = read_window(log.store, 0, 2**62)
            moments.append(time.monotonic())
            verdict, features = judge_window(reference, current, task, settings)
            moments.append(time.monotonic())
            html, snapshot = Path(folder) / "evidently.html", Path(folder) / "evidently.json"
            write_evidently_report(features, verdict.features, html, snapshot, settings.max_report_rows)
            moments.append(time.monotonic())
            for name, spent in zip(seconds, np.diff(moments), strict=True):
                seconds[name].append(float(spent))
            print(
                f"round {number + 1}: {verdict.status}, {moments[-1] - moments[0]:.1f} s", file=sys.stderr, flush=True
            )
        # Beside the medians: what one round costs on a machine that others use as well, imports included.
        cpu_seconds = (time.process_time() - cpu) / arguments.rounds
        log.store.close()
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    result = {
        "rows": arguments.rows,
        "seconds": round(sum(medians.values()), 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu_seconds": round(cpu_seconds, 2),
        "features": len(features),
        **medians,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
