"""Which model a job is about: a bundle's folder, or a version of the registry."""

from __future__ import annotations

from pydantic import Field

from modeling.bundle import load_bundle
from modeling.schema import TaskSpec
from ray_jobs.job import JobConfig, Location


class ModelChoice(JobConfig):
    """Fields of jobs that need a model's classes."""

    model: str = Field("champion", description="registry alias or version whose classes are the labels'")
    bundle: Location | None = Field(None, description="a bundle's folder instead")
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"

    def task(self) -> TaskSpec:
        """The model's task.

        Raises:
            ValueError: there is no such model, or its bundle is damaged.
        """
        if self.bundle is not None:
            return load_bundle(self.bundle).task
        from modeling.registry import Registry

        version = Registry(self.tracking_uri, self.model_name, self.artifact_root).resolve(self.model)
        return load_bundle(version.uri, version.digest).task
