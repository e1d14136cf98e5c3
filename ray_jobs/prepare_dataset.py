"""Validates images and metadata, quarantines bad rows to a report, and writes a dataset version with byte ranges and
folds, named by a digest of its content. An attempt that was cut off goes on where it stopped; --check adds tests;
--add-labels adds lesions of the prediction log that experts have labelled, see docs/labels.md."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field, field_validator

from data_pipelines.added_pictures import PictureGoneError
from data_pipelines.data_checks import CheckLimits, Verdict, run_checks
from data_pipelines.dataset_version import SplitSettings, prepare_version
from data_pipelines.image_dataset import open_dataset
from data_pipelines.label_additions import LabelAdditions, NothingToAddError
from data_pipelines.labelled_lesions import AddLabels
from data_pipelines.progress import Progress
from modeling.schema import TaskSpec
from monitoring.prediction_log import patient_hmac
from ray_jobs.job import JobConfig, Location, run_job, say
from store.database import StoreUnavailableError, open_store
from store.dataset_lineage import PredictionsGoneError
from store.synced_files import replace_synced

ATTEMPTS = 3


class PrepareDatasetConfig(JobConfig):
    images: Location | None = Field(
        description="HDF5 file or URL, one dataset of encoded bytes per image id; null: metadata alone"
    )
    metadata: Location = Field(description="CSV with ids, groups, labels and features")
    out: Location = Field(description="folder that holds this data set's versions")
    task: TaskSpec
    num_folds: int = Field(5, ge=2, le=20)
    fold_by: str | None = Field(None, description="a column whose every value becomes a fold, e.g. the institution")
    gate_fraction: float = Field(0.15, ge=0.0, le=0.5, description="share of groups that never train")
    seed: int = Field(0, ge=0)
    decode_check: bool = Field(True, description="decode every picture and quarantine those that fail")
    check: bool = Field(False, description="run the data tests; a failed one ends the job with exit code 2")
    limits: CheckLimits = Field(default_factory=CheckLimits, description="when a data test warns or fails")
    add_labels: AddLabels | None = Field(None, description="labelled lesions of the log to add; true: as by default")

    @field_validator("add_labels", mode="before")
    @classmethod
    def _as_by_default(cls, value: Any) -> Any:
        # `--add-labels` alone.
        return AddLabels() if value is True else None if value is False else value


def prepare(config: PrepareDatasetConfig, additions: LabelAdditions | None) -> dict[str, Any]:
    """See `prepare_version`."""
    split = SplitSettings(config.num_folds, config.gate_fraction, config.seed, config.fold_by)
    places = config.images, config.metadata, config.out
    return prepare_version(*places, config.task, split, config.decode_check, say, additions)


def prepare_with_labels(config: PrepareDatasetConfig, settings: AddLabels) -> dict[str, Any]:
    """`prepare` with labelled lesions of the log; again where a patient is erased meanwhile.

    Raises:
        ValueError: as `prepare`, or the store or the key cannot be read.
    """
    pseudonym = None
    if settings.patient_key_file is not None:
        try:
            key = Path(settings.patient_key_file).read_bytes()
        except OSError as error:
            where = f"add_labels.patient_key_file {settings.patient_key_file}: {error.strerror}"
            raise ValueError(f"{where}; expected the service's key, or null to look for no patients") from error
        pseudonym = partial(patient_hmac, key=key)
    try:
        store = open_store(settings.store_url, create=False)
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return prepare(config, LabelAdditions(store, settings, pseudonym))
                except (PredictionsGoneError, PictureGoneError) as error:
                    say(f"attempt {attempt}: {error}")
                except NothingToAddError as error:
                    if settings.required:
                        raise
                    say(f"without labelled lesions: {error}")
                    return prepare(config, None)
        finally:
            store.close()
    except StoreUnavailableError as error:
        raise ValueError(f"add_labels.store_url: {error}") from error
    raise ValueError(f"add_labels: lesions were erased during each of {ATTEMPTS} attempts; run it again")


def run(config: PrepareDatasetConfig) -> dict[str, Any]:
    settings = config.add_labels
    result = prepare(config, None) if settings is None else prepare_with_labels(config, settings)
    if config.check:
        result["checks"] = check(result["dataset"], config.metadata, config.limits)
    return result


def check(dataset: str, metadata: str, limits: CheckLimits) -> dict[str, str]:
    """Runs the data tests on a version, says each verdict and writes them to `<version>.checks.json`.

    Raises:
        ValueError: a check failed.
    """
    version = open_dataset(dataset)
    header = list(pd.read_csv(metadata, nrows=0).columns)
    with Progress("near-duplicates", say) as progress:
        verdicts = run_checks(version, header, limits, progress)
    width = max(len(verdict.check) for verdict in verdicts)
    for verdict in verdicts:
        say(f"{verdict.verdict.upper():<4}  {verdict.check:<{width}}  {verdict.detail}")
    # Beside the version, which never changes: the limits may.
    report = Path(f"{dataset}.checks.json")
    replace_synced(report, json.dumps([Verdict._asdict(verdict) for verdict in verdicts], indent=1).encode())
    failed = [verdict for verdict in verdicts if verdict.verdict == "fail"]
    if failed:
        reasons = "; ".join(f"{verdict.check}: {verdict.detail}" for verdict in failed)
        raise ValueError(f"{len(failed)} of {len(verdicts)} data tests failed: {reasons}")
    return {verdict.check: verdict.verdict for verdict in verdicts}


if __name__ == "__main__":
    run_job("prepare_dataset", PrepareDatasetConfig, run, __doc__)
