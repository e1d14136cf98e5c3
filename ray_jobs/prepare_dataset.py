"""Validates images and metadata, quarantines bad rows to a report, and writes a dataset version with byte ranges and
folds, named by a digest of its content."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from data_pipelines.dataset_version import SplitSettings, prepare_version
from modeling.schema import TaskSpec
from ray_jobs.job import JobConfig, Location, run_job, say


class PrepareDatasetConfig(JobConfig):
    images: Location = Field(description="HDF5 file, one dataset of encoded bytes per image id")
    metadata: Location = Field(description="CSV with ids, groups, labels and features")
    out: Location = Field(description="folder that holds this data set's versions")
    task: TaskSpec
    num_folds: int = Field(5, ge=2, le=20)
    gate_fraction: float = Field(0.15, ge=0.0, le=0.5, description="share of groups that never train")
    seed: int = Field(0, ge=0)
    decode_check: bool = Field(True, description="decode every picture and quarantine those that fail")


def run(config: PrepareDatasetConfig) -> dict[str, Any]:
    split = SplitSettings(config.num_folds, config.gate_fraction, config.seed)
    return prepare_version(config.images, config.metadata, config.out, config.task, split, config.decode_check, say)


if __name__ == "__main__":
    run_job("prepare_dataset", PrepareDatasetConfig, run, __doc__)
