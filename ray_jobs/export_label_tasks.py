"""Writes tasks for Label Studio: pictures of the log that experts should label next, with the model's suggestion, and
the labelling config of a project for them. The same log and config give the same files. See docs/labels.md."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from pydantic import Field, model_validator

from modeling.moments import MomentUs
from ray_jobs.job import Location, run_job, say
from ray_jobs.model_choice import ModelChoice
from store.database import StoreUnavailableError, open_store
from store.image_files import ImageFiles
from store.label_consensus import State
from store.label_studio import label_task, labelling_config
from store.label_tasks import LabelTask, select_label_tasks
from store.prediction_records import PredictionFilter
from store.synced_files import replace_synced


class ExportLabelTasksConfig(ModelChoice):
    since: MomentUs = Field(None, description="received then or later; default: from the first on")
    until: MomentUs = Field(None, description="received before; default: to the last")
    model_version: str | None = Field(None, description="only its predictions; null: of every model")
    band: Literal["low", "moderate", "high"] | None = None
    abstained: bool | None = Field(None, description="true: only those the model refused; false: only the others")
    label_state: State | Literal["unlabelled", "any"] = Field("unlabelled", description="disagreed: for a third reader")
    num_tasks: int = Field(200, ge=1, le=100_000)
    uncertain_share: float = Field(0.5, ge=0.0, le=1.0, description="nearest to the threshold; the rest is random")
    seed: int = Field(0, ge=0, description="of the random sample")
    suggestion: bool = Field(True, description="false: experts do not see what the model says")
    metadata: bool = Field(False, description="true: tasks show what the caller sent with the picture, e.g. the age")
    images: Literal["url", "files"] = Field("url", description="files: Label Studio reads the image store itself")
    service_url: str = Field("http://127.0.0.1:8000", pattern=r"^https?://\S+$", description="for images = url")
    document_root: Location | None = Field(None, description="for images = files in a folder: Label Studio's root")
    images_url: Location = "images"
    store_url: Location = "sqlite:///store.db"
    out: Location = Field("label-tasks", description="folder of tasks.json and labelling_config.xml")

    @model_validator(mode="after")
    def _root_of_files(self) -> ExportLabelTasksConfig:
        files = ImageFiles(self.images_url)
        if self.images == "files" and files.local:
            if self.document_root is None:
                raise ValueError("document_root is not given; expected the folder that Label Studio serves files from")
            if not Path(files.url).is_relative_to(self.document_root):
                raise ValueError(f"document_root = {self.document_root!r} does not hold the images in {files.url}")
        if self.since is not None and self.until is not None and self.until <= self.since:
            raise ValueError("until is not after since")
        return self

    def address(self, row: dict[str, Any]) -> str:
        """Where Label Studio finds a prediction's picture."""
        if self.images == "url":
            return f"{self.service_url.rstrip('/')}/v1/predictions/{quote(row['id'], safe='')}/image"
        files = ImageFiles(self.images_url)
        path = files.path(row["image_hash"], row["suffix"])
        if not files.local:
            return path
        # Not a copy: an erasure takes the picture out of Label Studio too.
        return f"/data/local-files/?d={quote(str(PurePosixPath(path).relative_to(self.document_root)))}"


def _chosen(config: ExportLabelTasksConfig) -> tuple[list[LabelTask], int]:
    state = config.label_state
    wanted = PredictionFilter(
        from_us=config.since,
        to_us=config.until,
        model_version=config.model_version,
        band=config.band,
        abstained=config.abstained,
        labelled=False if state == "unlabelled" else None,
        label_state=None if state in ("unlabelled", "any") else state,
    )
    try:
        store = open_store(config.store_url, create=False)
        try:
            return select_label_tasks(store, wanted, config.num_tasks, config.uncertain_share, config.seed)
        finally:
            store.close()
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}") from error


def run(config: ExportLabelTasksConfig) -> dict[str, Any]:
    if "://" in config.out:
        raise ValueError(f"out = {config.out!r}: expected a folder")
    task = config.task()
    chosen, available = _chosen(config)
    tasks = [label_task(item, config.address(item.row), task, config.suggestion, config.metadata) for item in chosen]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    replace_synced(out / "labelling_config.xml", labelling_config(task).encode())
    replace_synced(out / "tasks.json", json.dumps(tasks, indent=1, allow_nan=False).encode())
    uncertain = sum(item.selected_by == "uncertain" for item in chosen)
    say(f"{len(tasks)} of {available} predictions: {uncertain} uncertain, {len(tasks) - uncertain} random")
    return {
        "tasks": str(out / "tasks.json"),
        "labelling_config": str(out / "labelling_config.xml"),
        "num_tasks": len(tasks),
        "uncertain": uncertain,
        "random": len(tasks) - uncertain,
        "available": available,
    }


if __name__ == "__main__":
    run_job("export_label_tasks", ExportLabelTasksConfig, run, __doc__)
