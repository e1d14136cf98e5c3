"""The stages of a retraining: prepare -> warm_start -> train -> export -> gate. Each calls the job of that name in this
process, and may be called again after it was cut off anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipelines.image_dataset import open_dataset
from modeling.bundle import Bundle, load_bundle
from modeling.registry import CHAMPION, ModelVersion, Registry
from ray_jobs import export_engine, prepare_dataset, promote_model, train_model
from ray_jobs.job import REPO_ROOT, JobConfig, read_yaml, say, validation_lines
from ray_jobs.retraining_driver import Stage
from store.candidates import note_origin, record_candidate
from store.database import Store
from store.retraining_queue import RetrainClaim
from training.warm_start import write_initial_weights

if TYPE_CHECKING:
    from ray_jobs.retrain import RetrainConfig

StepModel = TypeVar("StepModel", bound=JobConfig)


class StepConfig(BaseModel):
    """A job's config: a YAML file of this repository, and what is different here."""

    model_config = ConfigDict(extra="forbid")

    config: str = Field(description="from the repository's root")
    values: dict[str, Any] = Field(default_factory=dict, description="merged over it, group by group")


def step_config(name: str, step: StepConfig, model: type[StepModel], fixed: Mapping[str, Any]) -> StepModel:
    """The config of a stage's job.

    Args:
        name: of the stage, for the message.
        fixed: what the retraining decides; wins.

    Raises:
        ValueError: one line that names the stage and each wrong field.
    """
    values = _merged(_merged(read_yaml(REPO_ROOT / step.config), step.values), fixed)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{name} ({step.config}): {validation_lines(error)}") from error


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def check_steps(config: RetrainConfig) -> None:
    """Finds a wrong step before hours of work.

    Raises:
        ValueError: see `step_config`.
    """
    if config.prepare is not None:
        _prepare_config(config, config.prepare)
    _train_config(config, "0", None)
    step_config("export", config.export, export_engine.ExportEngineConfig, {})
    step_config("gate", config.gate, promote_model.PromoteModelConfig, {})


def retraining_stages(config: RetrainConfig, claim: RetrainClaim, store: Store) -> dict[str, Stage]:
    """The stages of one request, by name, in order; which there are depends on the config alone."""
    stages: dict[str, Stage] = {"prepare": partial(prepare, config)}
    if config.warm_start:
        stages["warm_start"] = partial(warm_start, config, claim)
    stages["train"] = partial(train, config, claim, store)
    stages["export"] = partial(export, config)
    stages["gate"] = partial(judge, config, store)
    return stages


def run_name(request_id: str) -> str:
    """The training run of a request; a training that was cut off goes on under it."""
    return f"retrain-{request_id}"


def open_registry(config: RetrainConfig) -> Registry:
    """The model registry of the config."""
    return Registry(config.tracking_uri, config.model_name, config.artifact_root)


def prepare(config: RetrainConfig, finished: Mapping[str, Any]) -> dict[str, Any]:
    """The data set version that the later stages use: a new one of what there is now or, without `prepare`, the one
    that `train` names."""
    if config.prepare is None:
        version = open_dataset(_train_config(config, "0", None).dataset)
        return {"dataset": str(version.path), "digest": version.digest, "num_rows": len(version.lesions)}
    made = prepare_dataset.run(_prepare_config(config, config.prepare))
    return {name: made[name] for name in ("dataset", "digest", "num_rows", "num_quarantined", "reused") if name in made}


def warm_start(config: RetrainConfig, claim: RetrainClaim, finished: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the networks' initial weights from the champion's training; says why where it cannot."""
    training = _train_config(config, claim.id, finished["prepare"])
    folder = Path(config.runs) / f"{run_name(claim.id)}.initial"
    registry = open_registry(config)
    champion = registry.find(CHAMPION)
    try:
        if champion is None:
            raise ValueError("there is no champion")
        run = Path(config.runs) / registry.client.get_run(champion.run_id).info.run_name
        weights = write_initial_weights(run, open_dataset(training.dataset), training.training, folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        say(f"no warm start, training begins with weights {training.training.model.weights!r}: {reason}")
        return {"weights": None, "reason": reason}
    say(f"warm start from version {champion.version}")
    return {"weights": weights, "from_version": champion.version}


def train(config: RetrainConfig, claim: RetrainClaim, store: Store, finished: Mapping[str, Any]) -> dict[str, Any]:
    """Trains and registers the candidate, once: a training that was cut off after it had registered is not repeated."""
    job = _train_config(config, claim.id, finished["prepare"], finished.get("warm_start", {}).get("weights"))
    registered = open_registry(config).adopt_candidate(run_name(claim.id))
    if registered is None:
        made = train_model.run(job)
        result = {name: made[name] for name in ("model_version", "digest", "run_name", "gate")}
    else:
        say(f"an earlier attempt registered version {registered.version}")
        bundle = load_bundle(registered.uri, registered.digest)
        gate = {name: train_model.summary(bundle.metrics(name)["gate"]) for name in bundle.manifest.contexts}
        result = {"model_version": registered.version, "digest": bundle.digest, "gate": gate}
        result["run_name"] = run_name(claim.id)
    record_candidate(store, result["model_version"], result["digest"], result["gate"])
    dataset = open_dataset(job.dataset)
    note_origin(store, result["model_version"], result["digest"], dataset.digest, claim.requested_by, claim.id)
    return {**result, "dataset": str(dataset.path), "dataset_digest": dataset.digest}


def export(config: RetrainConfig, finished: Mapping[str, Any]) -> dict[str, Any]:
    """Engines for the candidate, for this device."""
    trained = finished["train"]
    _, bundle = _candidate(config, finished)
    if "image" not in bundle.manifest.modalities:
        return {"skipped": "the model sees metadata alone"}
    fixed = {
        "model": trained["model_version"],
        "dataset": trained["dataset"],
        **_places(config, export_engine.ExportEngineConfig),
    }
    made = export_engine.run(step_config("export", config.export, export_engine.ExportEngineConfig, fixed))
    return {name: made[name] for name in ("device", "choice", "engine_set")}


def judge(config: RetrainConfig, store: Store, finished: Mapping[str, Any]) -> dict[str, Any]:
    """What the promotion gate says of the candidate, for whoever approves it; it decides nothing."""
    found, bundle = _candidate(config, finished)
    # Both models on the gate split of what the candidate was trained on, wherever later promotions look for it.
    fixed = {"model": found.version, "dataset": finished["train"]["dataset"]}
    fixed |= _places(config, promote_model.PromoteModelConfig)
    job = step_config("gate", config.gate, promote_model.PromoteModelConfig, fixed)
    champion = open_registry(config).find(CHAMPION)
    return promote_model.judge_candidate(job, found, bundle, champion, store)[0].as_json()


def _candidate(config: RetrainConfig, finished: Mapping[str, Any]) -> tuple[ModelVersion, Bundle]:
    found = open_registry(config).resolve(finished["train"]["model_version"])
    return found, load_bundle(found.uri, found.digest)


def labels_required(config: RetrainConfig) -> Literal["single", "agreed"]:
    """How many readers a label needs to get into the data set that `prepare` makes."""
    adding = None if config.prepare is None else _prepare_config(config, config.prepare).add_labels
    return "single" if adding is None else adding.require


def _prepare_config(config: RetrainConfig, step: StepConfig) -> prepare_dataset.PrepareDatasetConfig:
    model = prepare_dataset.PrepareDatasetConfig
    job = step_config("prepare", step, model, {})
    if job.add_labels is None:
        return job
    # Drift, or a schedule, may well ask before anything is labelled.
    return step_config("prepare", step, model, {"add_labels": {"store_url": config.store_url, "required": False}})


def _train_config(
    config: RetrainConfig, request_id: str, prepared: Mapping[str, Any] | None, weights: str | None = None
) -> train_model.TrainModelConfig:
    model = train_model.TrainModelConfig
    fixed: dict[str, Any] = {**_places(config, model), "run_name": run_name(request_id)}
    if prepared is not None:
        fixed["dataset"] = prepared["dataset"]
    if weights is not None:
        fixed["training"] = {"model": {"weights": weights}}
    return step_config("train", config.train, model, fixed)


def _places(config: RetrainConfig, model: type[JobConfig]) -> dict[str, str]:
    """One store, one registry, one place for each kind of file, whatever the steps' own configs say."""
    names = ("store_url", "tracking_uri", "artifact_root", "model_name", "runs", "bundles", "engine_sets")
    return {name: getattr(config, name) for name in names if name in model.model_fields}
