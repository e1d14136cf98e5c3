"""Stores experts' labels from a file: Label Studio's export (JSON or JSON-MIN) or a CSV. Imported twice, a label is
stored once; an annotation that was edited since supersedes what it said before. See docs/labels.md."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ray_jobs.job import Location, run_job, say
from ray_jobs.model_choice import ModelChoice
from store.database import StoreUnavailableError, open_store
from store.label_files import CSV, LABEL_STUDIO, LabelFile, read_csv_labels, read_label_studio
from store.label_import import store_labels
from store.synced_files import replace_synced

ACTOR = "import_labels"


class ImportLabelsConfig(ModelChoice):
    file: Location = Field(description="Label Studio's export, or a CSV")
    format: Literal["label_studio", "csv"] | None = Field(None, description="null: csv where the name ends so")
    instance: str = Field(
        "label-studio", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the Label Studio's name: its ids are its own"
    )
    labellers: dict[str, str] = Field(default_factory=dict, description="names by annotator's number or email")
    actor: str = Field(ACTOR, min_length=1, max_length=255, description="who imports, for the audit trail")
    store_url: Location = "sqlite:///store.db"
    out: Location = Field("label-imports", description="folder of the reports")


def read(config: ImportLabelsConfig, data: bytes) -> LabelFile:
    """The file's labels; ValueError, naming it, where it holds none that can be read."""
    task = config.task()
    kind = config.format or (CSV if config.file.lower().endswith(".csv") else LABEL_STUDIO)
    try:
        if kind == CSV:
            found = read_csv_labels(data, task)
        else:
            found = read_label_studio(data, task, config.instance, config.labellers)
    except ValueError as error:
        raise ValueError(f"file {config.file}: {error}") from error
    if not found.labels and found.problems:
        first = found.problems[0]
        what = f"none of {len(found.problems)} entries is a label"
        raise ValueError(f"file {config.file}: {what}; {first.place}: {first.reason}, {first.detail}")
    return found


def _say_alarm(alarm: dict[str, Any]) -> None:
    say(f"ALARM {alarm['kind']}: {alarm['message']}")


def run(config: ImportLabelsConfig) -> dict[str, Any]:
    if "://" in config.out or "://" in config.file:
        raise ValueError("file and out: expected local paths")
    try:
        data = Path(config.file).read_bytes()
    except OSError as error:
        raise ValueError(f"file {config.file}: {error.strerror}") from error
    found = read(config, data)
    try:
        store = open_store(config.store_url, create=False)
        try:
            counts, refused = store_labels(store, found.labels, config.actor, _say_alarm)
        finally:
            store.close()
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}; import the file again: what is stored is not stored twice") from error
    problems = [*found.problems, *refused]
    reasons = dict(sorted(Counter(problem.reason for problem in problems).items()))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    report = out / f"{Path(config.file).stem}-{hashlib.sha256(data).hexdigest()[:12]}.json"
    content = {"file": config.file, **counts, "refused": reasons, "problems": [item._asdict() for item in problems]}
    replace_synced(report, json.dumps(content, indent=1).encode())
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.items()) or "none"
    say(f"{counts['added']} labels added, {counts['known']} known, {counts['outdated']} outdated; refused: {listed}")
    return {**counts, "refused": reasons, "report": str(report)}


if __name__ == "__main__":
    run_job("import_labels", ImportLabelsConfig, run, __doc__)
