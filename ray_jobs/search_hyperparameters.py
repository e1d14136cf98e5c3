"""Ray Tune over the folds: Optuna proposes, ASHA stops poor trials between folds; every trial goes to MLflow, and the
best config becomes a file that `train_model --config` takes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from data_pipelines.image_dataset import open_dataset
from modeling.registry import Registry
from ray_jobs.job import JobConfig, Location, connect_ray, run_job, say
from ray_jobs.train_model import TrainModelConfig
from training.image_models import check_training
from tune.cross_validation import METRIC, run_search, trial_history
from tune.search_space import SearchSpace, check_space, with_overrides


class SearchHyperparametersConfig(JobConfig):
    train_model: TrainModelConfig = Field(description="the base that trials vary")
    space: SearchSpace = Field(min_length=1, description="training field -> distribution")
    num_trials: int = Field(8, ge=1, le=10_000)
    num_folds: int | None = Field(None, ge=1, description="folds a full trial trains; null: all of the data set's")
    max_concurrent: int = Field(1, ge=1, le=1024, description="trials at a time")
    seed: int = Field(0, ge=0)
    search_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    searches: Location = "searches"
    best_config: Location | None = Field(None, description="where the best config goes; default: the search's folder")


def run(config: SearchHyperparametersConfig) -> dict[str, Any]:
    base = config.train_model
    version = open_dataset(base.dataset)
    check_space(config.space, base.training, version.task)
    num_folds = config.num_folds or version.num_folds
    if num_folds > version.num_folds:
        raise ValueError(f"num_folds = {num_folds}: the data set has {version.num_folds} folds")
    check_training(base.training, version, range(num_folds))
    connect_ray()
    name = config.search_name or f"search-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    say(f"{config.num_trials} trials of up to {num_folds} folds over {sorted(config.space)}")
    results = run_search(
        base.training,
        config.space,
        str(version.path),
        config.searches,
        name,
        config.num_trials,
        num_folds,
        config.max_concurrent,
        config.seed,
    )
    failed = [result.error for result in results if result.error is not None]
    if len(failed) == len(results):
        raise RuntimeError(f"all {len(failed)} trials failed; the first: {failed[0]}")

    best = results.get_best_result(metric=METRIC, mode="max")
    chosen = base.model_copy(
        update={"dataset": str(version.path), "training": with_overrides(base.training, best.config)}
    )
    file = Path(config.best_config or Path(config.searches) / name / "best_config.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(chosen.model_dump(exclude_none=True), sort_keys=False), encoding="utf-8")

    say("logging the trials to MLflow")
    registry = Registry(base.tracking_uri, base.model_name, base.artifact_root)
    parent = registry.start_parent(name, params={"dataset": version.digest, "num_trials": config.num_trials}, tags={})
    for number, result in enumerate(results):
        history = trial_history(result.path)
        state = "failed" if result.error else "stopped early" if len(history) < num_folds else "finished"
        registry.log_trial(parent, f"trial_{number}", dict(result.config or {}), history, tags={"state": state})
    registry.finish(parent, "FINISHED")
    return {
        "best_config": str(file),
        "best": {key: value for key, value in (best.config or {}).items()},
        METRIC: round(float(best.metrics[METRIC]), 4),
        "trials": len(results),
        "failed": len(failed),
        "stopped_early": sum(len(trial_history(r.path)) < num_folds for r in results if r.error is None),
        "mlflow_run": parent,
    }


if __name__ == "__main__":
    run_job("search_hyperparameters", SearchHyperparametersConfig, run, __doc__)
