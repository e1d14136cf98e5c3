"""Bundle -> candidate engines, compared with torch's recorded answers and timed on this device -> an engine set.

The set goes under `engine_sets` and, for a registered model, into MLflow beside the version.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from modeling.bundle import load_bundle
from modeling.engine_selection import measure_candidates
from modeling.engine_set import Objective, ParityLimits
from modeling.registry import Registry, find_model
from ray_jobs.job import JobConfig, Location, run_job, say


class ExportEngineConfig(JobConfig):
    model: str = Field("candidate", description="alias, version, or path of a bundle")
    rounds: int = Field(7, ge=1, le=1000, description="alternating timing rounds; the median counts")
    objective: Objective = Field("throughput", description="throughput of the whole device, or latency of one run")
    limits: ParityLimits = Field(default_factory=ParityLimits)
    engine_sets: Location = "engine_sets"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"


def run(config: ExportEngineConfig) -> dict[str, Any]:
    found = find_model(config.model, config.tracking_uri, config.model_name, config.artifact_root)
    bundle = load_bundle(found.uri, found.digest)
    engine_set = measure_candidates(
        bundle, rounds=config.rounds, limits=config.limits, objective=config.objective, say=say
    )
    for report in engine_set.candidates:
        timings = ", ".join(f"{ms:.2f} at {bucket}" for bucket, ms in report.ms_per_image.items())
        say(f"{report.candidate.name}: {timings + ' (ms per image at batch size)' if timings else report.reason}")
    path = engine_set.save(config.engine_sets)
    if found.version:
        Registry(config.tracking_uri, config.model_name, config.artifact_root).log_artifact_file(
            found, path, "engine_sets"
        )
    return {
        "model_version": found.version or None,
        "digest": bundle.digest,
        "device": engine_set.device,
        # Raises when every candidate was refused, after the set was kept: the promotion gate reads it.
        "engine_choice": engine_set.choice,
        "choice": engine_set.summary,
        "chosen": engine_set.chosen,
        "candidates": [
            {
                "candidate": report.candidate.name,
                "precision": report.candidate.precision,
                "passed": report.passed,
                "reason": report.reason,
                "parity": report.parity.model_dump() if report.parity else None,
                "ms_per_image": {bucket: round(ms, 3) for bucket, ms in report.ms_per_image.items()},
            }
            for report in engine_set.candidates
        ],
        "engine_set": str(path),
    }


if __name__ == "__main__":
    run_job("export_engine", ExportEngineConfig, run, __doc__)
