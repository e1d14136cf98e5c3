"""MLflow runs: the connection, and what jobs log. `modeling.registry` builds the model versions on it.

MLflow is imported when it is first used (2-9 s), so that jobs that never reach it do not pay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


class MlflowRuns:
    """The runs of one MLflow experiment.

    Args:
        tracking_uri: `sqlite:///` with an absolute path, or the URL of another MLflow backend.
        model_name: the experiment's name, also that of the registered model.
        artifact_root: absolute folder or URL where artifacts are copied to.
    """

    def __init__(self, tracking_uri: str, model_name: str, artifact_root: str):
        self.tracking_uri = tracking_uri
        self.model_name = model_name
        self.artifact_root = artifact_root if "://" in artifact_root else Path(artifact_root).absolute().as_uri()
        path = tracking_uri.removeprefix("sqlite:///")
        self._database = Path(path) if path != tracking_uri else None
        self._connected: Any = None

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One process at a time on a SQLite backend; a database server does its own locking."""
        if self._database is None:
            yield
            return
        import fcntl

        self._database.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self._database}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def client(self) -> Any:
        """MLflow's client, connected on first use; creates database and experiment where there are none."""
        if self._connected is None:
            # Read by MLflow when it is imported.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("DO_NOT_TRACK", "1")
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            # Of four processes that meet an empty file, MLflow's own migrations let one survive.
            with self.exclusive():
                client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
                client.search_registered_models(max_results=1)
                if client.get_experiment_by_name(self.model_name) is None:
                    client.create_experiment(self.model_name, artifact_location=self.artifact_root)
            self._connected = client
        return self._connected

    def start_parent(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> str:
        """Starts a run and returns its id; `finish` ends it."""
        experiment = self.client.get_experiment_by_name(self.model_name).experiment_id
        run_id = self.client.create_run(experiment, run_name=name, tags=dict(tags or {})).info.run_id
        self.log_params(run_id, params)
        return run_id

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """The newest run that has these tags, or None."""
        experiment = self.client.get_experiment_by_name(self.model_name).experiment_id
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self.client.search_runs([experiment], wanted, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0].info.run_id if found else None

    def children(self, parent_run_id: str) -> list[Any]:
        """The MLflow runs below a parent, deleted ones left out."""
        experiment = self.client.get_experiment_by_name(self.model_name).experiment_id
        wanted, token = f"tags.`mlflow.parentRunId` = '{parent_run_id}'", None
        runs: list[Any] = []
        while token is None or token:
            page = self.client.search_runs([experiment], wanted, max_results=1000, page_token=token)
            runs, token = runs + list(page), page.token or ""
        return runs

    def start_child(
        self, parent_run_id: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> str:
        """Starts a run below another one and returns its id."""
        return self.start_parent(name, params, {**(tags or {}), "mlflow.parentRunId": parent_run_id})

    def log_metrics(
        self,
        run_id: str,
        metrics: Sequence[Mapping[str, float]] | Mapping[str, float],
        first_step: int = 0,
    ) -> None:
        """Logs one set of metrics, or one per step; undefined (None, NaN) ones are left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [metrics] if isinstance(metrics, Mapping) else metrics
        entries = [
            Metric(name, float(value), now, step)
            for step, row in enumerate(rows, first_step)
            for name, value in row.items()
            if value is not None and math.isfinite(value)
        ]
        for start in range(0, len(entries), 1000):  # MLflow's limit per call
            self.client.log_batch(run_id, metrics=entries[start : start + 1000])

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs params, nested ones dotted, and all of them as the file params.json. Repeated, it changes nothing."""
        from mlflow.entities import Param

        if not params:
            return
        # MLflow cuts a parameter at 6000 characters; the file has all of it. It comes first: a run with params has it.
        self.client.log_dict(run_id, json.loads(json.dumps(params, default=str)), "params.json")
        flat = _flat(params)
        entries = [
            Param(name, value if isinstance(value, str) else json.dumps(value, default=str))
            for name, value in flat.items()
        ]
        for start in range(0, len(entries), 100):  # MLflow's limit per call
            self.client.log_batch(run_id, params=entries[start : start + 100])
