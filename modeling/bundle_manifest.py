"""The bundle's manifest: what a model is, and the sha256 of every file it consists of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modeling.schema import Context, TaskSpec

MANIFEST = "manifest.json"
IMAGE_SCORER = "image_scorer.onnx"
PARITY = "parity.npz"
PROJECTION = "projection.npz"
REFERENCE = "reference.parquet"
MODEL_CARD = "model_card.md"


class BundleManifest(BaseModel):
    """What `manifest.json` says about a bundle.

    Attributes:
        name: model name, for people.
        created_at: ISO 8601 time, UTC.
        input_size: side S of the network's square input, pixels; 0 when the bundle has no image model.
        embedding_dim: length D of the embedding.
        contexts: contexts the bundle can answer, in the order of `TaskSpec.contexts`.
        sampling_prior: class frequencies the image model was trained at, (K,).
        population_prior: class frequencies that risks are for, (K,): those of the data set unless configured otherwise.
        training: the resolved training config.
        files: sha256 (hex) of every other file, by path relative to the bundle.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    task: TaskSpec
    input_size: int = Field(ge=0)
    backbone: str
    embedding_dim: int = Field(ge=0)
    modalities: list[Literal["image", "metadata"]] = Field(min_length=1)
    dataset_digest: str
    git_commit: str
    contexts: list[Context] = Field(min_length=1)
    sampling_prior: list[float]
    population_prior: list[float]
    training: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
                raise ValueError(f"file {name!r} is not a plain relative path")
        return files

    @model_validator(mode="after")
    def _fits_the_task(self) -> BundleManifest:
        for field in ("sampling_prior", "population_prior"):
            if len(getattr(self, field)) != self.task.num_classes:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} entries; the task has {self.task.num_classes} classes"
                )
        foreign = [context for context in self.contexts if context not in self.task.contexts]
        if foreign:
            raise ValueError(f"contexts {foreign} do not fit task {self.task.name!r}, which has {self.task.contexts}")
        return self

    @property
    def required_files(self) -> list[str]:
        """Files without which the bundle cannot be scored, checked or reviewed."""
        names = [REFERENCE, MODEL_CARD]
        if "image" in self.modalities:
            names += [IMAGE_SCORER, PARITY, PROJECTION]
        for context in self.contexts:
            names += [f"contexts/{context}/model.json", f"contexts/{context}/metrics.json"]
        return names


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(directory: Path) -> list[str]:
    """Relative paths of all files of a bundle directory except its manifest, sorted."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if not path.is_dir() and path != directory / MANIFEST
    )


def write_manifest(directory: str | Path, manifest_fields: Mapping[str, Any]) -> str:
    """Hashes every file of a finished bundle directory and writes its manifest, the last file, in one step.

    Args:
        directory: holds all files of the bundle.
        manifest_fields: fields of `BundleManifest` without `files`.

    Returns:
        The bundle digest: hex sha256 of the manifest's bytes.

    Raises:
        ValueError: a field is wrong, or a required file is missing.
    """
    directory = Path(directory)
    files = {name: sha256_file(directory / name) for name in files_below(directory)}
    manifest = BundleManifest.model_validate({**manifest_fields, "files": files})
    missing = [name for name in manifest.required_files if name not in files]
    if missing:
        raise ValueError(f"bundle {directory} lacks {', '.join(missing)}")
    data = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode()
    partial = directory.with_name(directory.name + ".manifest-partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, directory / MANIFEST)
    return hashlib.sha256(data).hexdigest()
