"""Writes a synthetic data set in the exact ISIC 2024 format: pictures as HDF5 and 55-column metadata, and with
--num-test-patients the 44-column test files. Synthetic: it shows no real person and has no clinical meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from data_pipelines.synthetic_dataset import SHIFTS, Shift, write_sample
from ray_jobs.job import JobConfig, Location, run_job, say


def _by_name(value: Any) -> Any:
    """The shift of this name; anything else is left to be validated as a shift's fields."""
    if isinstance(value, str):
        if value not in SHIFTS:
            raise ValueError(f"expected one of {list(SHIFTS)}, or fields as in --shift.blur 2")
        return SHIFTS[value]
    return value


class MakeSampleConfig(JobConfig):
    out: Location = "samples/synthetic"
    num_patients: int = Field(100, ge=4, le=100_000)
    num_test_patients: int = Field(0, ge=0, le=100_000, description="further patients, written without labels")
    lesions_per_patient: float = Field(12.0, ge=2.0, le=2000.0, description="expected number")
    prevalence: float = Field(0.05, gt=0.0, lt=0.5, description="expected share of malignant lesions")
    seed: int = Field(0, ge=0, description="other seeds give other patients")
    shift: Annotated[Shift, BeforeValidator(_by_name)] = Field(
        SHIFTS["none"],
        description="none, camera (other tint, blur, older patients), or fields: --shift.blur 2 --shift.age-years 10",
    )


def run(config: MakeSampleConfig) -> dict[str, Any]:
    out = Path(config.out)
    table = write_sample(
        out,
        config.num_patients,
        config.lesions_per_patient,
        config.prevalence,
        config.seed,
        config.shift,
        say,
        config.num_test_patients,
    )
    return {
        "images": str(out / "train-image.hdf5"),
        "metadata": str(out / "train-metadata.csv"),
        "num_rows": len(table),
        "num_patients": config.num_patients,
        "num_malignant": int(table["target"].sum()),
        "shift": config.shift.model_dump(),
        "synthetic": True,
    }


if __name__ == "__main__":
    run_job("make_sample", MakeSampleConfig, run, __doc__)
