"""Folds -> image models and out-of-fold scores -> fusion -> calibration -> thresholds -> evaluation -> bundle ->
MLflow candidate. A run that was cut off goes on with `--run-name` and the same config."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from data_pipelines.image_dataset import DatasetVersion, open_dataset
from modeling.bundle import load_bundle
from modeling.image_scorer import ExportableScorer
from modeling.metrics import risk
from modeling.registry import Registry
from ray_jobs.job import REPO_ROOT, JobConfig, Location, connect_ray, run_job, say
from ray_jobs.model_reports import tell_report
from store.candidates import record_candidate
from store.database import Store, StoreUnavailableError, open_store
from training.config import BuildConfig, TrainingConfig
from training.context_models import ContextResults
from training.environment import describe_environment
from training.evaluation_notes import check_trainable
from training.evaluation_plots import plot_clinical, plot_evaluation
from training.image_models import RunFolder, check_training, train_image_models
from training.missed_pictures import plot_missed
from training.model_building import build_bundle
from training.ood_report import plot_abstention

if TYPE_CHECKING:
    import pandas as pd


class TrainModelConfig(JobConfig):
    dataset: Location = Field(description="a prepared data set's folder, or one of its versions")
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    build: BuildConfig = Field(default_factory=BuildConfig)
    max_concurrent: int = Field(1, ge=1, le=64, description="networks (of folds, and the refit) trained at a time")
    run_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$", description="name it to resume it")
    runs: Location = "runs"
    bundles: Location = "bundles"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"
    store_url: Location | None = Field(None, description="where GET /v1/candidates finds the candidate; null: nowhere")


def git_commit() -> str:
    """The code's commit: from the environment in a submitted job, else from git; "unknown" outside a checkout."""
    if commit := os.environ.get("DERMRAY_GIT_COMMIT"):
        return commit
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


def flat_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """`<context>.<split>.<metric>` -> value, for MLflow; intervals become `..._low` and `..._high`."""
    flat: dict[str, float] = {}
    for context, splits in evaluation.items():
        for split in ("gate", "out_of_fold"):
            for name, value in splits[split].items():
                if isinstance(value, dict) and value.get("value") is not None:
                    flat[f"{context}.{split}.{name}"] = float(value["value"])
                    for bound in ("low", "high"):
                        if value.get(bound) is not None:
                            flat[f"{context}.{split}.{name}_{bound}"] = float(value[bound])
                elif isinstance(value, int | float):
                    flat[f"{context}.{split}.{name}"] = float(value)
            for name, bounds in splits[split]["intervals"].items():
                for bound, value in bounds.items():
                    if value is not None:
                        flat[f"{context}.{split}.{name}_{bound}"] = float(value)
    return flat


def abstention_metrics(measured: dict[str, Any]) -> dict[str, float]:
    """Share of gate pictures that the abstention rule refuses, and mean share over the kinds of unusable ones."""
    gate = {name: measured["gate"][name]["share"] for name in ("all", "malignant", "benign")}
    flat = {f"abstention.gate.{name}": share for name, share in gate.items() if share is not None}
    for group in ("non_lesion", "corrupted_lesion"):
        shares = [row["share"] for row in measured["kinds"] if row["set"] == group]
        if shares:
            flat[f"abstention.{group}"] = sum(shares) / len(shares)
    return flat


def write_report(folder: Path, bundle: Path, version: DatasetVersion, results: ContextResults) -> None:
    """Measurements, pictures, environment, out-of-fold scores and the missed cancers' ids, for the run folder and
    MLflow. It names lesions: not for the bundle."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    evaluation = results.evaluation
    files = {"evaluation": evaluation, "comparison": results.comparison, "environment": describe_environment()}
    if results.ood is not None:
        files["abstention"] = results.ood.measured
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    out_of_fold_table(version, results).to_parquet(folder / "out_of_fold.parquet", index=False)
    for context, missed in results.missed.items():
        missed.to_csv(folder / f"missed_cancers_{context}.csv", index=False)
    reference = pd.read_parquet(bundle / "reference.parquet")
    malignant = reference["label"].isin(version.task.malignant).to_numpy()
    risks = {name: reference[f"risk_{name}"].to_numpy() for name in evaluation}
    title = version.task.name + (" (synthetic)" if version.task.synthetic else "")
    has_image = version.images_path is not None
    clinical = {context: report["clinical"] for context, report in evaluation.items()}
    if results.ood is not None and results.ood.examples:
        # Beside the report: it shows spoilt pictures of patients, which stay in house.
        plot_abstention(folder.parent / "abstention.png", results.ood, title)
    plot_evaluation(folder / "evaluation.png", malignant, risks, title, has_image)
    plot_clinical(folder / "clinical.png", malignant, risks, clinical, version.task.classes, title, has_image)


def out_of_fold_table(version: DatasetVersion, results: ContextResults) -> pd.DataFrame:
    """Every training lesion as models that saw no lesion of its fold score it: id, fold, label (class name), and per
    context `risk_<context>` and, of more than two classes, `<context>_<class>`."""
    import pandas as pd

    task, train = version.task, version.lesions.iloc[version.training_positions]
    classes = np.array(task.classes, dtype=object)
    table = {"id": train["id"].to_numpy(), "fold": train["fold"].to_numpy(), "label": classes[train["label"]]}
    for context, probabilities in results.out_of_fold.items():
        table[f"risk_{context}"] = risk(probabilities, task)
        if task.num_classes > 2:
            table |= {f"{context}_{name}": probabilities[:, index] for index, name in enumerate(task.classes)}
    return pd.DataFrame(table)


def summary(gate: dict[str, Any]) -> dict[str, Any]:
    """The few figures of a context that fit on one line."""
    shown = {}
    for name in ("auc", "pauc", "balanced_accuracy"):
        value = gate[name]
        shown[name] = {key: None if number is None else round(number, 4) for key, number in value.items()}
    return shown


def run_parameters(config: TrainModelConfig, version: DatasetVersion) -> dict[str, Any]:
    """What made the model, for MLflow: dataset digest, code, and the resolved config of whatever was trained."""
    training = config.training.model_dump() if version.images_path is not None else {"seed": config.training.seed}
    facts = {"dataset": version.digest, "git_commit": git_commit()}
    return facts | _flatten(training) | _flatten(config.build.model_dump(), "build.")


def open_candidates(store_url: str | None) -> Store | None:
    """The store that hears of the candidate, opened before hours of training; ValueError where it cannot be."""
    try:
        return None if store_url is None else open_store(store_url)
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}") from error


def run(config: TrainModelConfig) -> dict[str, Any]:
    version = open_dataset(config.dataset)
    check_trainable(version)
    store = open_candidates(config.store_url)
    run_name = config.run_name or f"{version.task.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if version.images_path is not None:
        check_training(config.training, version, [None, *version.training_folds])
    folder = RunFolder(Path(config.runs) / run_name, config.training, version)
    out_of_fold, fold_metrics, scorer = None, [], None
    if version.images_path is None:
        say(f"{version.task.name} has no pictures: the model sees metadata alone")
    else:
        connect_ray()
        out_of_fold, fold_metrics, models = train_image_models(
            config.training, version, folder, config.max_concurrent, say
        )
        served = models if config.build.ensemble else models[:1]
        networks = [model.scorer(config.training, version.task) for model in served]
        scorer = ExportableScorer(networks, config.training.model.num_views)

    directory = Path(config.bundles) / run_name
    if directory.exists():
        # Left by an attempt that died before its candidate was registered; nothing refers to it.
        shutil.rmtree(directory)
    digest, results = build_bundle(
        directory,
        version,
        config.training,
        config.build,
        scorer,
        out_of_fold,
        git_commit(),
        say,
    )
    report = folder.path / "report"
    write_report(report, directory, version, results)
    if version.images_path is not None:
        context, missed = list(results.missed.items())[-1]
        pictures = folder.path / f"missed_cancers_{context}.png"
        plot_missed(pictures, version, missed, results.thresholds[context], version.task.name)
    say("registering the bundle as a candidate")
    registry = Registry(config.tracking_uri, config.model_name, config.artifact_root)
    registered = registry.log_candidate(
        directory,
        run_name=run_name,
        params=run_parameters(config, version),
        metrics=flat_metrics(results.evaluation)
        | ({} if results.ood is None else abstention_metrics(results.ood.measured))
        | {f"fold_{row['fold']}.{name}": row[name] for row in fold_metrics for name in ("auc", "pauc")},
        artifacts_dir=report,
        tags={"synthetic": str(version.task.synthetic).lower(), "task": version.task.name},
    )
    gate = {context: summary(splits["gate"]) for context, splits in results.evaluation.items()}
    if store is not None:
        try:
            record_candidate(store, registered.version, registered.digest, gate, dataset_digest=version.digest)
            tell_report(store, load_bundle(directory, registered.digest))
        except StoreUnavailableError as error:
            say(f"the candidate is registered, but GET /v1/candidates may not show it: {error}")
    return {
        "model_version": registered.version,
        "bundle": str(directory),
        "digest": digest,
        "run_name": run_name,
        "report": str(report),
        "synthetic": version.task.synthetic,
        "gate": gate,
        "gains": [row for row in results.comparison["gains"]["gate"] if row["model"] == list(results.evaluation)[-1]],
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            value = {str(position): entry for position, entry in enumerate(value)}
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


if __name__ == "__main__":
    run_job("train_model", TrainModelConfig, run, __doc__)
