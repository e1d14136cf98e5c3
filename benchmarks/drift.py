"""Seconds and memory of `check_drift` on one day of the prediction log, as users run it.

    python -m benchmarks.drift [--rows 1000000] [--trailing-rows 28000] [--keep DIR] [--postgres URL]

A synthetic log of ISIC 2024's 40 columns: the day, of patients with four lesions each at twelve institutions with six
devices, and a fortnight before it. The reference has 3,000 lesions of 400 patients. The job runs in a process of its
own, imports included; its peak memory is the kernel's figure for that process. Filling the log is not counted. Prints
one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DAY = datetime(2026, 3, 15, tzinfo=UTC)
TRAILING_DAYS = 14
BATCH = 20_000
NUM_INSTITUTIONS, NUM_DEVICES, LESIONS_PER_PATIENT = 12, 6, 4
REPOSITORY = Path(__file__).resolve().parent.parent
_DAY_US = 86_400_000_000


def task_columns() -> dict[str, Any]:
    """The metadata columns of ISIC 2024, from the config that prepares it."""
    import yaml

    config = yaml.safe_load((REPOSITORY / "configs" / "prepare_dataset.yaml").read_text(encoding="utf-8"))
    return config["task"]["columns"]


def lesions(rows: int, first_patient: int, seed: int, columns: dict[str, Any]) -> dict[str, Any]:
    """Random lesions as columns of (rows,); half of every figure's variance lies between patients."""
    import numpy as np

    from monitoring.prediction_log import EMBEDDING_DIM, QUALITY_NAMES

    rng = np.random.default_rng(seed)
    patients = -(-rows // LESIONS_PER_PATIENT)
    group = np.repeat(np.arange(patients), LESIONS_PER_PATIENT)[:rows]

    def values(width: int | None = None) -> np.ndarray:
        shape = () if width is None else (width,)
        own = rng.standard_normal((patients, *shape), np.float32)[group]
        return np.sqrt(0.5) * (own + rng.standard_normal((rows, *shape), np.float32))

    table: dict[str, Any] = {"group": group + first_patient}
    table["image_score"] = 1 / (1 + np.exp(2 - values()))
    table["risk"] = 1 / (1 + np.exp(3 - values()))
    table |= {name: (0.5 + 0.05 * values()).round(4) for name in QUALITY_NAMES}
    for name, spec in columns.items():
        if spec["kind"] == "categorical":
            table[name] = np.array([f"{name} {number}" for number in range(6)])[rng.integers(0, 6, patients)[group]]
        else:
            middle, width = (spec["maximum"] + spec["minimum"]) / 2, (spec["maximum"] - spec["minimum"]) / 8
            table[name] = np.clip(middle + width * values(), spec["minimum"], spec["maximum"]).round(4)
    table["institution"] = rng.integers(0, NUM_INSTITUTIONS, patients)[group]
    table["device"] = rng.integers(0, NUM_DEVICES, patients)[group]
    table["embedding"] = values(EMBEDDING_DIM).astype("<f2")
    return table


def benchmark_task(columns: dict[str, Any]) -> Any:
    from modeling.schema import TaskSpec

    return TaskSpec(
        name="benchmark",
        fold_group="patient_id",
        label_column="target",
        classes=["benign", "malignant"],
        malignant=["malignant"],
        columns=columns,
    )


def reference_frame(rows: int, seed: int, columns: dict[str, Any]) -> Any:
    """A bundle's reference of metadata alone that also has scores, image quality and embeddings."""
    import numpy as np
    import pandas as pd

    from monitoring.prediction_log import EMBEDDING_NAMES

    table = lesions(rows, 10**9, seed, columns)
    embedding = table.pop("embedding").astype(np.float32)
    for name in ("institution", "device"):
        del table[name]
    embeddings = dict(zip(EMBEDDING_NAMES, embedding.T, strict=True))
    return pd.DataFrame(table | embeddings).assign(risk_none=table["risk"], abstention="answered")


def write_reference(directory: Path, columns: dict[str, Any]) -> None:
    """A bundle with such a reference."""
    import numpy as np

    from modeling.bundle_manifest import write_manifest
    from modeling.metadata_fusion import BoosterConfig, FusionConfig, fit_context_model

    frame, task = reference_frame(3_000, 1, columns), benchmark_task(columns)
    labels = np.random.default_rng(0).integers(0, 2, len(frame))
    groups = frame["group"].to_numpy()
    values = {name: frame[name].to_numpy(object) for name in columns}
    prior = [0.5, 0.5]
    config = FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=5)
    model, _ = fit_context_model("none", task, None, values, labels, groups, groups % 3, config, prior, prior, 0)
    model.save(directory / "contexts" / "none")
    (directory / "contexts" / "none" / "metrics.json").write_text("{}")
    frame.to_parquet(directory / "reference.parquet", index=False)
    (directory / "model_card.md").write_text("Synthetic.\n")
    fields = {"name": "benchmark", "task": task.model_dump(), "input_size": 0, "backbone": "none", "embedding_dim": 0}
    fields |= {"modalities": ["metadata"], "dataset_digest": "d" * 64, "git_commit": "unknown", "contexts": ["none"]}
    write_manifest(directory, fields | {"sampling_prior": prior, "population_prior": prior})


def fill(url: str, rows: int, start_us: int, span_us: int, seed: int, columns: dict[str, Any]) -> None:
    """Writes so many predictions, spread evenly over the span, straight into the store's table."""
    import hashlib

    import sqlalchemy as sql

    from monitoring.prediction_log import QUALITY_NAMES
    from store.database import open_store
    from store.tables import predictions

    store = open_store(url)
    figures = ("image_score", "risk", *QUALITY_NAMES)
    fixed = {"caller": "benchmark", "role": "champion", "model_version": "1", "context": "none", "abstained": False}
    fixed |= {"reasons": [], "stage_ms": {"total": 12.5}, "threshold": 0.1, "band": "low"}
    for first in range(0, rows, BATCH):
        num = min(BATCH, rows - first)
        table = lesions(num, seed * 10**8 + first, seed * 1_000_003 + first, columns)
        sent = {name: table[name].tolist() for name in (*figures, *columns, "institution", "device", "group")}
        records = []
        for index in range(num):
            number = first + index
            records.append(
                {
                    **fixed,
                    "id": hashlib.md5(f"{seed}-{number}".encode()).hexdigest(),
                    "received_at": start_us + number * span_us // rows,
                    "patient_hmac": hashlib.sha256(str(sent["group"][index]).encode()).hexdigest(),
                    "institution": f"institution {sent['institution'][index]}",
                    "device": f"device {sent['device'][index]}",
                    "metadata": {name: sent[name][index] for name in columns},
                    "embedding": table["embedding"][index].tobytes(),
                    **{name: sent[name][index] for name in figures},
                }
            )
        with store.writing() as connection:
            connection.execute(sql.insert(predictions), records)
        print(f"filled {first + num:,} of {rows:,}", file=sys.stderr, flush=True)
    store.close()


def prepare(home: str, url: str, rows: int, trailing_rows: int) -> None:
    """The bundle and the log."""
    columns = task_columns()
    write_reference(Path(home) / "bundle", columns)
    start = int(DAY.timestamp()) * 1_000_000
    if trailing_rows:
        fill(url, trailing_rows, start - TRAILING_DAYS * _DAY_US, TRAILING_DAYS * _DAY_US, 1, columns)
    fill(url, rows, start, _DAY_US, 2, columns)


def check(home: Path, url: str) -> tuple[dict[str, Any], float, resource.struct_rusage]:
    """Runs the job; returns its answer, its seconds and what it used."""
    day = f"{DAY:%Y-%m-%d}"
    command = [sys.executable, "-m", "ray_jobs.check_drift", "--bundle", str(home / "bundle"), "--store-url", url]
    command += ["--out", str(home / "drift"), "--start", day, "--end", day]
    started = time.monotonic()
    with open(home / "answer.json", "w") as answer:
        process = subprocess.Popen(command, stdout=answer, cwd=REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"check_drift ended with exit code {process.returncode}")
    return json.loads((home / "answer.json").read_text().splitlines()[-1]), seconds, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="predictions in the window")
    parser.add_argument("--trailing-rows", type=int, default=28_000, help="predictions of the fortnight before")
    parser.add_argument("--keep", type=Path, help="folder for bundle, log and reports; a log that is there is used")
    parser.add_argument("--postgres", help="URL of an empty PostgreSQL database for the log; default: SQLite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(arguments.keep or folder).absolute()
        url = arguments.postgres or f"sqlite:///{home}/store.db"
        if not (home / "filled").exists():
            home.mkdir(parents=True, exist_ok=True)
            # In a process of its own: a child's peak memory starts at that of its parent.
            filling = multiprocessing.get_context("spawn").Process(
                target=prepare, args=(str(home), url, arguments.rows, arguments.trailing_rows)
            )
            filling.start()
            filling.join()
            if filling.exitcode:
                raise SystemExit(f"the log was not filled: exit code {filling.exitcode}")
            (home / "filled").touch()
        answer, seconds, usage = check(home, url)
        _, unchanged_seconds, _ = check(home, url)
    (window,) = answer["windows"]
    result = {
        "rows": window["rows"],
        "seconds": round(seconds, 1),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "unchanged_seconds": round(unchanged_seconds, 1),
        "status": window["status"],
        "drifted": window["drifted"],
        "store": "postgresql" if arguments.postgres else "sqlite",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
