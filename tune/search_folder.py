"""A search's folder: whose search it is, and the finished folds of its trials, which no restart trains again.

search.json   the search's id and what it was started with
driver.json   which driver runs it, and when it was last seen
ledger.json   trials, scores and cost so far
tune/         Ray Tune's experiment
folds/        a record per finished fold; checkpoints of folds in training
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from training.config import TrainingConfig
from tune.driver_lease import DriverLease
from tune.json_files import read_json, write_json


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        dotted: leaf
        for name, inner in value.items()
        for dotted, leaf in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def without_credentials(url: str) -> str:
    """The URL without user, password and query, any of which may be a secret; a path stays as it is."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class SearchFolder:
    """Paths of one search under `searches` (a path or URL that every node reaches)."""

    def __init__(self, searches: str, name: str):
        self.name = name
        self.url = f"{searches.rstrip('/')}/{name}"
        self.tune_path = f"{self.url}/tune"
        self.ledger = f"{self.url}/ledger.json"
        self.lease = DriverLease(f"{self.url}/driver.json")
        self._marker = f"{self.url}/search.json"
        self._unusable = f"searches = {searches!r}: the search's folder"

    def claim(self, identity: dict[str, Any], resume: bool) -> str:
        """Makes the folder this search's and this process its driver; returns the search's id.

        Args:
            identity: what decides the trials' results and where they are logged, as JSON values without secrets.

        Raises:
            ValueError: as `check`, or the folder cannot be written.
        """
        known = self.check(identity, resume)
        try:
            self.lease.take()
            if not resume:
                write_json(self._marker, known)
        except OSError as error:
            raise ValueError(f"{self._unusable} cannot be written: {error.strerror or error}") from error
        return known["id"]

    def check(self, identity: dict[str, Any], resume: bool) -> dict[str, Any]:
        """What `claim` would write of the search, or has written: `id` and `started_with`. Writes nothing.

        Raises:
            ValueError: it exists and `resume` is false, or it does not or is another search and `resume` is true, or
                another driver runs it, or it cannot be read.
        """
        # Ray Tune's state and the records of folds name the folder; a copy of it would write to the first one.
        identity = {**json.loads(json.dumps(identity)), "folder": without_credentials(self.url)}
        try:
            known = read_json(self._marker)
        except OSError as error:
            raise ValueError(f"{self._unusable} cannot be read: {error.strerror or error}") from error
        if not resume:
            if known is not None:
                raise ValueError(
                    f"search_name = {self.name!r}: there is such a search in {self.url}; "
                    "go on with it by --resume true, or give another name"
                )
            return {"id": uuid.uuid4().hex, "started_with": identity}
        if known is None:
            raise ValueError(f"search_name = {self.name!r}: no such search in {self.url} to resume")
        then, now = _flat(known["started_with"]), _flat(identity)
        changed = [field for field in {**then, **now} if then.get(field) != now.get(field)]
        if changed:
            shown = ", ".join(f"{field} was {then.get(field)!r}, now {now.get(field)!r}" for field in changed[:3])
            raise ValueError(
                f"search_name = {self.name!r} was started otherwise: {shown}"
                + (f", and {len(changed) - 3} more" if len(changed) > 3 else "")
                + "; resume it with what it was started with, or give another name"
            )
        self.lease.check()
        return known

    def remove_checkpoints(self) -> None:
        """Deletes what cut off folds of a search that is over have left; the records stay."""
        from fsspec.core import url_to_fs

        files, path = url_to_fs(f"{self.url}/folds")
        for entry in files.ls(path, detail=False) if files.exists(path) else []:
            if not entry.endswith(".json"):
                files.rm(entry, recursive=True)


class FoldRecords:
    """The folds of one training config that this search has finished.

    A record is found by the config and the data set, which decide the result: it outlives the trial that made it.
    """

    def __init__(self, search_url: str, config: TrainingConfig, dataset_digest: str):
        identity = json.dumps({"config": config.model_dump(), "dataset": dataset_digest}, sort_keys=True)
        self._folder = f"{search_url}/folds"
        self._digest = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _record(self, fold: int) -> str:
        return f"{self._folder}/{self._digest}_fold_{fold}.json"

    def get(self, fold: int) -> dict[str, float] | None:
        """pauc, auc and seconds of a finished fold; None where it is not finished."""
        return read_json(self._record(fold))

    def begun(self, fold: int, run_name: str) -> bool:
        """Whether a fold is finished, or its Ray Train run has started."""
        from fsspec.core import url_to_fs

        files, path = url_to_fs(f"{self._folder}/{run_name}")
        return self.get(fold) is not None or files.exists(path)

    def train(self, fold: int, run_name: str, train: Callable[[str, str], dict[str, float]]) -> dict[str, float]:
        """Trains a fold and keeps its record; its checkpoints, which nothing else needs, are deleted.

        Args:
            run_name: of the Ray Train run; a fold that was cut off goes on under the same name.
            train: (storage_path, run_name) -> pauc and auc of the fold.
        """
        from fsspec.core import url_to_fs

        started = time.monotonic()
        record = {**train(self._folder, run_name), "seconds": time.monotonic() - started}
        write_json(self._record(fold), record)
        files, path = url_to_fs(f"{self._folder}/{run_name}")
        for leftover in (path, f"{path}.epoch"):
            if files.exists(leftover):
                files.rm(leftover, recursive=True)
        return record
