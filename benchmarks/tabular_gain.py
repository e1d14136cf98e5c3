"""What the metadata model gains over plain gradient boosting on the numeric columns, in repeated cross-validation.

    python -m benchmarks.tabular_gain --metadata isic2024_sample5k/train-metadata.csv

Each repeat draws other patient-grouped folds. A fold's model chooses its rounds, scaling, calibration and categories on
the other folds alone, by an inner cross-validation. The gain in pAUC is paired: the same rows, the same resampled
patients; its interval comes from a bootstrap over patients of the mean over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from data_pipelines.metadata_table import read_metadata
from data_pipelines.stratified_folds import assign_folds
from data_pipelines.table_scoring import metadata_arrays
from modeling.metadata_fusion import FusionConfig, fit_context_model
from modeling.metrics import partial_auc_above_tpr, resampled_areas, risk, roc_auc
from modeling.resampling import clustered_bootstrap
from modeling.schema import TaskSpec
from ray_jobs.job import REPO_ROOT, read_yaml

INNER_FOLDS = 4


def plain_boosting(table: pd.DataFrame, task: TaskSpec, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Scores float64 (M,) of scikit-learn's histogram gradient boosting with its defaults."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    matrix = table[task.numeric_columns].to_numpy(np.float64)
    malignant = task.malignant_mask[table["label"].to_numpy(np.int64)]
    model = HistGradientBoostingClassifier(random_state=seed).fit(matrix[train], malignant[train])
    return model.predict_proba(matrix[test])[:, 1]


def metadata_model(
    context: str, table: pd.DataFrame, task: TaskSpec, train: np.ndarray, test: np.ndarray, seed: int
) -> np.ndarray:
    """Risk float64 (M,) of the model that a bundle without pictures holds for this context."""
    own, held_out = table.iloc[train], table.iloc[test]
    labels = own["label"].to_numpy(np.int64)
    groups = {"train": own["context"].to_numpy(str), "test": held_out["context"].to_numpy(str)}
    inner = assign_folds(labels, own["group"].to_numpy(str), task.classes, INNER_FOLDS, 0.0, seed)
    prior = np.bincount(labels, minlength=task.num_classes) / len(labels)
    model, _ = fit_context_model(
        context,
        task,
        None,
        metadata_arrays(own, task),
        labels,
        groups["train"],
        inner,
        FusionConfig(),
        prior,
        None,
        seed,
    )
    return risk(model.predict(None, metadata_arrays(held_out, task), groups["test"]), task)


def one_repeat(table: pd.DataFrame, task: TaskSpec, num_folds: int, seed: int) -> dict[str, np.ndarray]:
    """Out-of-fold scores (N,) of every model."""
    labels, groups = table["label"].to_numpy(np.int64), table["group"].to_numpy(str)
    folds = assign_folds(labels, groups, task.classes, num_folds, 0.0, seed)
    scores = {name: np.empty(len(table)) for name in ("plain", *task.tabular_contexts)}
    for fold in range(num_folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        scores["plain"][test] = plain_boosting(table, task, train, test, seed)
        for context in task.tabular_contexts:
            scores[context][test] = metadata_model(context, table, task, train, test, seed)
    return scores


def summarise(table: pd.DataFrame, task: TaskSpec, repeats: list[dict[str, np.ndarray]], samples: int) -> dict:
    """pAUC and AUC by model, means over the repeats, and the gain over `plain` with its interval."""
    malignant = task.malignant_mask[table["label"].to_numpy(np.int64)]
    names = list(repeats[0])

    areas = [[resampled_areas(malignant, scores[name]) for name in names] for scores in repeats]

    def means(rows: np.ndarray) -> np.ndarray:
        pauc = np.mean([[of_model(rows)[1] for of_model in of_repeat] for of_repeat in areas], axis=0)
        return np.concatenate([pauc, pauc - pauc[0]])

    point = means(np.arange(len(table)))
    low, high = clustered_bootstrap(means, table["group"].to_numpy(str), samples, seed=0)
    result = {}
    for index, name in enumerate(names):
        gain = len(names) + index
        spread = [partial_auc_above_tpr(malignant, scores[name]) for scores in repeats]
        result[name] = {
            "pauc": round(float(point[index]), 4),
            "pauc_interval": [round(float(low[index]), 4), round(float(high[index]), 4)],
            "pauc_by_repeat": [round(float(value), 4) for value in spread],
            "auc": round(float(np.mean([roc_auc(malignant, scores[name]) for scores in repeats])), 4),
            "pauc_gain": round(float(point[gain]), 4),
            "pauc_gain_interval": [round(float(low[gain]), 4), round(float(high[gain]), 4)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", required=True, help="CSV with labels, as for prepare_dataset")
    parser.add_argument("--config", default=str(REPO_ROOT / "configs/prepare_dataset.yaml"), help="holds the task")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap resamples of patients")
    arguments = parser.parse_args()
    task = TaskSpec.model_validate(read_yaml(Path(arguments.config))["task"])
    table, quarantine = read_metadata(arguments.metadata, task, require_labels=True)
    started = time.monotonic()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending = [pool.submit(one_repeat, table, task, arguments.folds, seed) for seed in range(arguments.repeats)]
        repeats = []
        for number, future in enumerate(pending, start=1):
            repeats.append(future.result())
            seconds = time.monotonic() - started
            print(f"repeat {number} of {len(pending)} after {seconds:.0f} s", file=sys.stderr, flush=True)
    result = {"rows": len(table), "quarantined": len(quarantine), "folds": arguments.folds, "repeats": len(repeats)}
    print(json.dumps(result | summarise(table, task, repeats, arguments.samples)))


if __name__ == "__main__":
    main()
