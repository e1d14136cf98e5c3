"""Validates images and metadata, quarantines bad rows to a report, and writes a dataset version with byte ranges and
folds, named by a digest of its content. An attempt that was cut off goes on where it stopped; --check adds tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from data_pipelines.data_checks import CheckLimits, Verdict, run_checks
from data_pipelines.dataset_version import SplitSettings, prepare_version
from data_pipelines.image_dataset import open_dataset
from data_pipelines.progress import Progress
from modeling.schema import TaskSpec
from ray_jobs.job import JobConfig, Location, run_job, say


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


def run(config: PrepareDatasetConfig) -> dict[str, Any]:
    split = SplitSettings(config.num_folds, config.gate_fraction, config.seed, config.fold_by)
    result = prepare_version(config.images, config.metadata, config.out, config.task, split, config.decode_check, say)
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
    report.write_text(json.dumps([Verdict._asdict(verdict) for verdict in verdicts], indent=1), encoding="utf-8")
    failed = [verdict for verdict in verdicts if verdict.verdict == "fail"]
    if failed:
        reasons = "; ".join(f"{verdict.check}: {verdict.detail}" for verdict in failed)
        raise ValueError(f"{len(failed)} of {len(verdicts)} data tests failed: {reasons}")
    return {verdict.check: verdict.verdict for verdict in verdicts}


if __name__ == "__main__":
    run_job("prepare_dataset", PrepareDatasetConfig, run, __doc__)
