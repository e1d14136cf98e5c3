"""Ray Tune over the folds: Optuna proposes, ASHA prunes poor trials between folds; trials go to MLflow as they run, and
the best config becomes a file that `train_model --config` takes. A search that was cut off goes on with the same
config, its `--search-name` and `--resume true`."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from data_pipelines.image_dataset import DatasetVersion, open_dataset
from ray_jobs.job import JobConfig, Location, connect_ray, run_job, say
from ray_jobs.train_model import TrainModelConfig
from training.evaluation_notes import check_trainable
from training.image_models import check_training
from tune.cluster_room import cluster_room
from tune.cross_validation import SearchPlan, TrainFold, run_search, train_fold
from tune.driver_lease import SearchTakenOverError
from tune.search_folder import SearchFolder, without_credentials
from tune.search_ledger import METRIC, SearchLedger, outcomes_line, search_line
from tune.search_plots import write_search_report
from tune.search_space import SearchSpace, check_space, networks, trial_config
from tune.search_tracking import SearchTracking


class PruningConfig(BaseModel):
    """ASHA, in folds: at 1, 2, 4, ... folds (with the defaults) a trial below the median of those before it ends."""

    model_config = ConfigDict(extra="forbid")

    grace_folds: int = Field(1, ge=1, description="folds that every trial trains")
    reduction_factor: float = Field(2.0, gt=1.0, le=16.0, description="about one trial in so many goes on at a rung")


class SearchHyperparametersConfig(JobConfig):
    train_model: TrainModelConfig = Field(description="the base that trials vary")
    space: SearchSpace = Field(min_length=1, description="training field -> distribution")
    num_trials: int = Field(8, ge=1, le=10_000)
    num_folds: int | None = Field(None, ge=1, description="folds a full trial trains; null: all of the data set's")
    max_concurrent: int = Field(1, ge=1, le=1024, description="trials at a time; fewer where the cluster is too small")
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    seed: int = Field(0, ge=0)
    search_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$", description="name it to resume it")
    resume: bool = Field(False, description="go on with the search of this name")
    searches: Location = "searches"
    best_config: Location | None = Field(None, description="where the best config goes; default: the search's folder")


def check_networks(plan: SearchPlan, version: DatasetVersion) -> None:
    """Builds each network that a trial can draw: a trial that cannot would fail after the others were paid for.

    Raises:
        ValueError: what `check_training` refuses.
    """
    for training in networks(plan.space, plan.base):
        try:
            check_training(training, version, range(plan.num_folds))
        except ValueError as error:
            model = training.model
            raise ValueError(f"a trial of backbone {model.backbone!r}, weights {model.weights!r}: {error}") from error


def make_plan(config: SearchHyperparametersConfig, version: DatasetVersion) -> SearchPlan:
    """The search of a config.

    Raises:
        ValueError: more folds than there are, a resume without a name, or a space that leaves the config.
    """
    num_folds = config.num_folds or version.num_folds
    if num_folds > version.num_folds:
        raise ValueError(f"num_folds = {num_folds}: the data set has {version.num_folds} folds")
    if config.pruning.grace_folds > num_folds:
        raise ValueError(f"pruning.grace_folds = {config.pruning.grace_folds}: a full trial has {num_folds} folds")
    if config.resume and config.search_name is None:
        raise ValueError("resume = true: expected search_name, the name of the search to go on with")
    check_space(config.space, config.train_model.training, version.task)
    return SearchPlan(
        base=config.train_model.training,
        space=config.space,
        dataset=str(version.path),
        num_trials=config.num_trials,
        num_folds=num_folds,
        max_concurrent=config.max_concurrent,
        grace_folds=config.pruning.grace_folds,
        reduction_factor=config.pruning.reduction_factor,
        seed=config.seed,
    )


def run(config: SearchHyperparametersConfig, train: TrainFold = train_fold) -> dict[str, Any]:
    base = config.train_model
    version = open_dataset(base.dataset)
    check_trainable(version)
    if version.images_path is None:
        raise ValueError(f"dataset {version.path} has no pictures; the search trains image models alone")
    plan = make_plan(config, version)
    name = config.search_name or f"search-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = SearchFolder(config.searches, name)
    check_networks(plan, version)
    params = plan.identity(version.digest)
    # Ray Tune brings back the callback that logs to MLflow as it was: another address would be half of the search's.
    identity = params | {
        "tracking_uri": without_credentials(base.tracking_uri),
        "artifact_root": without_credentials(base.artifact_root),
        "model_name": base.model_name,
    }
    folder.check(identity, config.resume)
    connect_ray()
    # Before the folder is claimed: on a larger cluster the same command starts the search.
    cluster_room(plan.base, plan.max_concurrent)
    search_id = folder.claim(identity, config.resume)
    try:
        result = _search(config, plan, folder, name, search_id, params, train)
    finally:
        folder.lease.release()
    return result


def _search(
    config: SearchHyperparametersConfig,
    plan: SearchPlan,
    folder: SearchFolder,
    name: str,
    search_id: str,
    params: dict[str, Any],
    train: TrainFold,
) -> dict[str, Any]:
    """The claimed search, in MLflow under `name` with `params`."""
    base = config.train_model
    say(f"search {name}: {plan.num_trials} trials of up to {plan.num_folds} folds over {sorted(plan.space)}")
    tracking = SearchTracking(base.tracking_uri, base.model_name, base.artifact_root, search_id)
    parent = tracking.start(name, params)
    status: str | None = "FAILED"
    try:
        ledger = run_search(plan, folder, tracking, say, train)
        if ledger.count("running") or len(ledger.trials) < plan.num_trials:
            status = "KILLED"
            raise RuntimeError(f"the search was stopped; it goes on with --search-name {name} --resume true")
        say(search_line(ledger))
        folder.lease.renew()
        result = _finish(config, plan, ledger, folder, tracking)
        status = "FINISHED"
    except SearchTakenOverError:
        # Its MLflow run is the other driver's.
        status = None
        raise
    finally:
        if status is not None:
            tracking.finish(status)
    return {**result, "mlflow_run": parent}


def _finish(
    config: SearchHyperparametersConfig,
    plan: SearchPlan,
    ledger: SearchLedger,
    folder: SearchFolder,
    tracking: SearchTracking,
) -> dict[str, Any]:
    """Writes the best config, brings MLflow up to date and adds tables and pictures."""
    import fsspec

    tracking.sync(ledger)
    best = ledger.best()
    if best is None or len(best.folds) < plan.num_folds:
        errors = [entry.error for entry in ledger.entries() if entry.error]
        why = f"; the first failure: {errors[0]}" if errors else ""
        raise RuntimeError(
            f"no trial trained all {plan.num_folds} folds, so none is the best ({outcomes_line(ledger)}){why}"
        )
    chosen = config.train_model.model_copy(
        update={"dataset": plan.dataset, "training": trial_config(plan.base, plan.space, best.params)}
    )
    file = config.best_config or f"{folder.url}/best_config.yaml"
    text = yaml.safe_dump(chosen.model_dump(exclude_none=True), sort_keys=False)
    with fsspec.open(file, "w", encoding="utf-8", auto_mkdir=True) as out:
        out.write(text)
    with tempfile.TemporaryDirectory() as directory:
        write_search_report(Path(directory), ledger, plan.space)
        (Path(directory) / "best_config.yaml").write_text(text, encoding="utf-8")
        tracking.log_files(Path(directory))
    folder.remove_checkpoints()
    return {
        "best_config": file,
        "best": best.params,
        "best_trial": best.number,
        METRIC: round(best.score, 4),
        "trials": len(ledger.trials),
        "failed": ledger.count("failed"),
        "pruned": ledger.count("pruned"),
        "folds_trained": sum(len(entry.folds) for entry in ledger.entries()),
        "wall_hours": round(ledger.wall_seconds / 3600, 4),
        "worker_cpu_hours": round(ledger.cpu_seconds / 3600, 4),
        "worker_gpu_hours": round(ledger.gpu_seconds / 3600, 4),
        "search": folder.url,
    }


if __name__ == "__main__":
    run_job("search_hyperparameters", SearchHyperparametersConfig, run, __doc__)
