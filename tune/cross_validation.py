"""A trial is a cross-validation: it trains fold after fold and reports the mean so far, so that a scheduler can end a
poor trial before later folds are paid for. A search that was cut off goes on: finished folds are not trained again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from data_pipelines.image_dataset import open_dataset
from training.config import TrainingConfig
from training.trainer import build_trainer, fit_fold
from tune.cluster_room import TRIAL_CPUS, cluster_room
from tune.json_files import read_json, write_json
from tune.search_folder import FoldRecords, SearchFolder
from tune.search_ledger import METRIC, SearchLedger, mean_score
from tune.search_space import SearchSpace, to_ray, trial_config
from tune.search_tracking import SearchTracking
from tune.tune_state import restored_tuner

TrainFold = Callable[[TrainingConfig, Any, int, str, str], dict[str, float]]


def train_fold(config: TrainingConfig, version: Any, fold: int, storage_path: str, name: str) -> dict[str, float]:
    """Trains on the other folds; returns pauc and auc of this one. A run of the same name goes on where it was cut."""
    return fit_fold(build_trainer(config, version, fold, storage_path, name), version, fold)


def cross_validate(sample: dict[str, Any], settings: dict[str, Any]) -> None:
    """Ray Tune's function trainable.

    `settings`: config (TrainingConfig dump), space, dataset, num_folds, folder (URL of the search), train_fold.
    """
    from ray import tune

    version = open_dataset(settings["dataset"])
    space = TypeAdapter(SearchSpace).validate_python(settings["space"])
    config = trial_config(TrainingConfig.model_validate(settings["config"]), space, sample)
    records = FoldRecords(settings["folder"], config, version.digest)
    trial = tune.get_context().get_trial_name()
    folds = version.training_folds[: settings["num_folds"]]
    names = [f"{trial}_fold_{fold}" for fold in folds]
    scores: list[float] = []
    aucs: list[float] = []
    for position, fold in enumerate(folds):
        record = records.get(fold)
        carried_over = record is not None
        if record is None:
            train = partial(settings["train_fold"], config, version, fold)
            record = records.train(fold, names[position], train)
        scores.append(record["pauc"])
        aucs.append(record["auc"])
        following = position + 1
        tune.report(
            {
                METRIC: mean_score(scores),
                "mean_auc": mean_score(aucs),
                "fold_pauc": record["pauc"],
                "fold_auc": record["auc"],
                "fold_scores": list(scores),
                "fold_seconds": record["seconds"],
                "folds": following,
                "carried_over": carried_over,
                "judged": following < len(folds) and records.begun(folds[following], names[following]),
            }
        )


@dataclass(frozen=True)
class SearchPlan:
    """What a search does. `dataset` is a path; `grace_folds` and `reduction_factor` are ASHA's, in folds."""

    base: TrainingConfig
    space: SearchSpace
    dataset: str
    num_trials: int
    num_folds: int
    max_concurrent: int
    grace_folds: int
    reduction_factor: float
    seed: int

    def identity(self, dataset_digest: str) -> dict[str, Any]:
        """What two runs of one search have in common, as JSON values."""
        return {
            "dataset": dataset_digest,
            "training": self.base.model_dump(),
            "space": {field: distribution.model_dump() for field, distribution in self.space.items()},
            "num_trials": self.num_trials,
            "num_folds": self.num_folds,
            "max_concurrent": self.max_concurrent,
            "grace_folds": self.grace_folds,
            "reduction_factor": self.reduction_factor,
            "seed": self.seed,
        }


def run_search(
    plan: SearchPlan,
    folder: SearchFolder,
    tracking: SearchTracking,
    say: Callable[[str], None],
    train: TrainFold = train_fold,
) -> SearchLedger:
    """Optuna proposes, ASHA prunes between folds; goes on with what `folder` holds. Needs a connected Ray.

    Args:
        tracking: its parent run has been started.
        say: prints a line; importable.
        train: trains one fold, as `train_fold`.

    Raises:
        ValueError: the cluster cannot hold one trial, or not as many at a time as when the search began.
        SearchTakenOverError: another driver has taken the search over.
        RuntimeError: Ray Tune's state cannot be read, or is older than finished trials.
    """
    from ray import tune

    from tune.fold_pruning import FoldPruning, FoldSearch
    from tune.live_search import LiveSearch, trial_name

    fitting, workers = cluster_room(plan.base, plan.max_concurrent)
    held = tuple(sum(worker[name] for worker in workers) for name in ("CPU", "GPU"))
    known = read_json(folder.ledger)
    if known is None:
        at_a_time = min(plan.max_concurrent, fitting)
        if at_a_time < plan.max_concurrent:
            say(f"max_concurrent = {plan.max_concurrent}: the cluster holds {fitting} trials at a time, which is taken")
        ledger = SearchLedger(num_trials=plan.num_trials, num_folds=plan.num_folds, at_a_time=at_a_time)
        write_json(folder.ledger, ledger.model_dump())
    else:
        at_a_time = SearchLedger.model_validate(known).at_a_time
        if fitting < at_a_time:
            raise ValueError(f"the search runs {at_a_time} trials at a time; this cluster holds {fitting}")

    settings = {
        "config": plan.base.model_dump(),
        "space": {field: distribution.model_dump() for field, distribution in plan.space.items()},
        "dataset": plan.dataset,
        "num_folds": plan.num_folds,
        "folder": folder.url,
        "train_fold": train,
    }
    trainable = tune.with_resources(tune.with_parameters(cross_validate, settings=settings), {"CPU": TRIAL_CPUS})
    tuner = restored_tuner(folder.tune_path, trainable, to_ray(plan.space), say)
    if tuner is None:
        if known is not None:
            say("Ray Tune left no state: trials are drawn again, finished folds are kept")
        tuner = tune.Tuner(
            trainable,
            param_space=to_ray(plan.space),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=plan.num_trials,
                max_concurrent_trials=at_a_time,
                search_alg=FoldSearch(plan.num_folds, plan.num_trials, at_a_time, plan.seed),
                scheduler=FoldPruning(plan.num_folds, plan.grace_folds, plan.reduction_factor, at_a_time),
                trial_name_creator=trial_name,
                trial_dirname_creator=trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder.url,
                callbacks=[LiveSearch(folder.ledger, folder.lease, tracking, say, held)],
                verbose=0,
            ),
        )
    tuner.fit()
    return SearchLedger.model_validate(read_json(folder.ledger))
