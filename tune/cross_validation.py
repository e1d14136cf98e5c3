"""A trial is a cross-validation: it trains fold after fold and reports the mean so far, so that a scheduler can end a
poor trial before later folds are paid for."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.image_dataset import open_dataset
from training.config import TrainingConfig
from training.trainer import build_trainer, fit
from tune.search_space import SearchSpace, to_ray, with_overrides

METRIC = "mean_pauc"


def cross_validate(sample: dict[str, Any], settings: dict[str, Any]) -> None:
    """Ray Tune's function trainable. `settings`: config (TrainingConfig dump), dataset, num_folds, storage_path."""
    from ray import tune

    version = open_dataset(settings["dataset"])
    config = with_overrides(TrainingConfig.model_validate(settings["config"]), sample)
    trial = tune.get_context().get_trial_id()
    scores: list[dict[str, float]] = []
    for fold in range(settings["num_folds"]):
        name = f"trial_{trial}_fold_{fold}"
        started = time.monotonic()
        model = fit(build_trainer(config, version, fold, settings["storage_path"], name))
        scores.append({"pauc": float(model.metrics["pauc"]), "auc": float(model.metrics["auc"])})
        finished = [row for row in scores if math.isfinite(row["pauc"])]
        tune.report(
            {
                METRIC: float(np.mean([row["pauc"] for row in finished])) if finished else 0.0,
                "mean_auc": float(np.mean([row["auc"] for row in finished])) if finished else 0.0,
                "fold_pauc": scores[-1]["pauc"],
                "fold_auc": scores[-1]["auc"],
                "folds": fold + 1,
                "fold_seconds": time.monotonic() - started,
            }
        )


def run_search(
    base: TrainingConfig,
    space: SearchSpace,
    dataset: str,
    storage_path: str,
    name: str,
    num_trials: int,
    num_folds: int,
    max_concurrent: int,
    seed: int,
) -> Any:
    """Optuna proposes, ASHA stops after a fold; returns Ray Tune's ResultGrid.

    Trials hold no CPU themselves: their train workers and data tasks need them, and on a small machine trials that
    held CPUs while waiting for workers would deadlock.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    settings = {
        "config": base.model_dump(),
        "dataset": dataset,
        "num_folds": num_folds,
        "storage_path": f"{storage_path}/{name}-runs",
    }
    trainable = tune.with_resources(tune.with_parameters(cross_validate, settings=settings), {"CPU": 0.1})
    scheduler = None
    if num_folds > 1:
        scheduler = ASHAScheduler(time_attr="folds", max_t=num_folds, grace_period=1, reduction_factor=2)
    tuner = tune.Tuner(
        trainable,
        param_space=to_ray(space),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=num_trials,
            max_concurrent_trials=max_concurrent,
            search_alg=OptunaSearch(seed=seed),
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(name=name, storage_path=storage_path, verbose=1),
    )
    return tuner.fit()


def trial_history(path: str | Path) -> list[dict[str, float]]:
    """Every report of one trial, in order, from Tune's result.json."""
    file = Path(path) / "result.json"
    if not file.exists():
        return []
    keep = (METRIC, "mean_auc", "fold_pauc", "fold_auc", "folds", "fold_seconds")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{name: float(row[name]) for name in keep if row.get(name) is not None} for row in rows]
