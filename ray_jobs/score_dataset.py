"""Batch scoring: a metadata CSV and its HDF5 pictures in, `isic_id,target` out (CSV or Parquet). Rows that cannot be
scored are listed with the reason in `<out's stem>.quarantine.csv`; every other row gets a number. Those whose number
should not be trusted (blurred, badly exposed, unlike training) are also listed, in `<out's stem>.abstained.csv`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from data_pipelines.dataset_version import file_sha256
from data_pipelines.hdf5_index import images_bytes, images_location, images_state, open_hdf5
from data_pipelines.table_scoring import check_context, score_table
from modeling.bundle import Bundle, load_bundle
from modeling.registry import find_model
from ray_jobs.job import JobConfig, Location, connect_ray, run_job, say


class ScoreDatasetConfig(JobConfig):
    images: Location | None = Field(None, description="HDF5 file, one dataset per image id; null: metadata alone")
    metadata: Location = Field(description="CSV with the model's id and metadata columns")
    out: Location = Field(description=".csv or .parquet")
    model: str = Field("champion", description="registry alias, version number, or a bundle's path")
    context: Literal["auto", "image_only", "none", "patient"] = "auto"
    num_scorers: int = Field(1, ge=1, le=1024, description="engine actors")
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"


def open_model(reference: str, tracking_uri: str, model_name: str, artifact_root: str) -> tuple[Bundle, str]:
    """A bundle by path, or by registry alias or version; and what to call it.

    Raises:
        ValueError: neither a bundle's folder nor a registered model.
    """
    found = find_model(reference, tracking_uri, model_name, artifact_root)
    bundle = load_bundle(found.uri, found.digest)
    return bundle, f"{model_name} version {found.version}" if found.version else bundle.manifest.name


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Writes CSV or Parquet under a temporary name first, so that a cut-off run leaves no half file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    if out.suffix == ".parquet":
        table.to_parquet(partial, index=False)
    else:
        table.to_csv(partial, index=False)
    partial.replace(out)


def write_beside(out: Path, name: str, header: list[str], rows: Sequence[Sequence[str]]) -> Path:
    """Writes `<out's stem>.<name>.csv`, whole or not at all, and returns its path; without rows there is no such file.

    A .csv and a .parquet of one stem share it: replacing what the other one's run wrote is said.
    """
    path = out.with_name(f"{out.stem}.{name}.csv")
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    before, after = path.read_bytes() if path.exists() else b"", text.getvalue().encode() if rows else b""
    other = out.with_suffix(".csv" if out.suffix == ".parquet" else ".parquet")
    if before not in (b"", after) and other.exists():
        say(f"{path} is shared with {other.name}; from now on it is about {out.name} alone")
    if rows:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(after)
        partial.replace(path)
    else:
        path.unlink(missing_ok=True)
    return path


def parts_folder(out: Path, bundle_digest: str, images: str | None, metadata: str) -> Path:
    """Where unfinished scores of exactly this model and these files are kept, beside the output.

    The pictures are known by place, size and state: hashing gigabytes would cost more than most interruptions.
    """
    facts = [] if images is None else [images_location(images), images_bytes(images), images_state(images)]
    # A table that is not there is reported when it is read.
    table = file_sha256(metadata) if Path(metadata).is_file() else ""
    identity = json.dumps([bundle_digest, *facts, table])
    return out.parent / f".{out.name}.parts-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def run(config: ScoreDatasetConfig) -> dict[str, Any]:
    out = Path(config.out)
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"out = {config.out!r}: expected a name ending in .csv or .parquet")
    bundle, name = open_model(config.model, config.tracking_uri, config.model_name, config.artifact_root)
    say(f"scoring with {name} ({bundle.task.name}, {bundle.manifest.backbone})")
    check_context(bundle, config.context)
    reads_images = "image" in bundle.manifest.modalities
    if reads_images:
        if config.images is None:
            raise ValueError(f"images is null; model {name} reads pictures: expected an HDF5 file")
        open_hdf5(config.images).close()
    images = config.images if reads_images else None
    parts = parts_folder(out, bundle.digest, images, config.metadata)
    if reads_images:
        connect_ray()
    scored = score_table(bundle, images, config.metadata, config.context, config.num_scorers, parts, say)
    # The scores come last: whoever finds them finds the lists as well, and until then the parts can make all three.
    quarantine = write_beside(out, "quarantine", ["id", "reason", "detail"], scored.quarantine)
    abstained = write_beside(out, "abstained", ["id", "reasons", "detail"], scored.abstained)
    write_table(scored.table, out)
    for left in out.parent.glob(f".{out.name}.parts-*"):
        shutil.rmtree(left)
    if scored.quarantine:
        say(f"{len(scored.quarantine)} rows could not be scored; reasons in {quarantine}")
    if scored.abstained:
        say(f"{len(scored.abstained)} of the scored rows should not be trusted; reasons in {abstained}")
    return {
        "out": str(out),
        "rows": len(scored.table),
        "quarantined": len(scored.quarantine),
        "abstained": len(scored.abstained),
        "images_without_metadata": scored.images_without_metadata,
        "context": scored.context,
        "model": name,
        "model_task": bundle.task.name,
        "synthetic": bundle.task.synthetic,
    }


if __name__ == "__main__":
    run_job("score_dataset", ScoreDatasetConfig, run, __doc__)
