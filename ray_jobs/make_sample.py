"""Writes a synthetic data set in the exact ISIC 2024 format: pictures as HDF5, 55-column metadata, and the 44-column
test layout of the same rows. Synthetic: it shows no real person and has no clinical meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_pipelines.synthetic_dataset import SHIFTS, write_sample
from ray_jobs.job import JobConfig, Location, run_job, say


class MakeSampleConfig(JobConfig):
    out: Location = "samples/synthetic"
    num_patients: int = Field(100, ge=4, le=1_000_000)
    lesions_per_patient: float = Field(12.0, ge=2.0, le=2000.0, description="expected number")
    prevalence: float = Field(0.05, gt=0.0, lt=0.5, description="expected share of malignant lesions")
    seed: int = Field(0, ge=0)
    shift: Literal["none", "camera"] = Field("none", description="camera: other tint, blur, older patients")


def run(config: MakeSampleConfig) -> dict[str, Any]:
    out = Path(config.out)
    table = write_sample(
        out,
        config.num_patients,
        config.lesions_per_patient,
        config.prevalence,
        config.seed,
        SHIFTS[config.shift],
        say,
    )
    return {
        "images": str(out / "train-image.hdf5"),
        "metadata": str(out / "train-metadata.csv"),
        "num_rows": len(table),
        "num_patients": config.num_patients,
        "num_malignant": int(table["target"].sum()),
        "shift": config.shift,
        "synthetic": True,
    }


if __name__ == "__main__":
    run_job("make_sample", MakeSampleConfig, run, __doc__)
