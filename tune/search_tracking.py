"""A search in MLflow: one parent run, one child per trial, brought up to date whenever a fold is done.

What is there already is read from MLflow itself, so that a restarted search adds nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.registry import Registry
from tune.search_ledger import METRIC, SearchLedger, TrialEntry

_TRIAL = "dermray.trial"
_STATUS = {"finished": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
_COUNTED = ("finished", "pruned", "failed")


@dataclass
class _Child:
    """What MLflow has of a trial."""

    run_id: str
    folds: int
    state: str
    has_params: bool


class SearchTracking:
    """The MLflow runs of one search.

    Args:
        search_id: from `SearchFolder.claim`; the parent run is found again by it.
    """

    def __init__(self, tracking_uri: str, model_name: str, artifact_root: str, search_id: str):
        self._settings = (tracking_uri, model_name, artifact_root, search_id)
        self._registry = Registry(tracking_uri, model_name, artifact_root)
        self._id = search_id
        self._parent: str | None = None
        # By trial id.
        self._children: dict[str, _Child] = {}
        self._steps = 0
        self._counts: dict[str, float] = {}

    def __reduce__(self) -> Any:
        # Ray Tune pickles its callbacks; a connection stays where it was made.
        return SearchTracking, self._settings

    def start(self, name: str, params: Mapping[str, Any]) -> str:
        """Starts the parent run, or goes on with that of a restarted search; returns its id."""
        registry = self._registry
        self._parent = registry.find_run({"dermray.search": self._id})
        if self._parent is None:
            self._parent = registry.start_parent(name, {}, {"dermray.search": self._id})
        if not registry.client.get_run(self._parent).data.params:
            registry.log_params(self._parent, params)
        registry.client.update_run(self._parent, status="RUNNING")
        return self._parent

    def _connect(self) -> str:
        if self._parent is None:
            self._parent = self._registry.find_run({"dermray.search": self._id})
            assert self._parent is not None, "the search's parent run was not started"
        if not self._children:
            client, children = self._registry.client, {}
            for run in self._registry.children(self._parent):
                folds = len({point.step for point in client.get_metric_history(run.info.run_id, "folds")})
                data = run.data
                children[data.tags[_TRIAL]] = _Child(run.info.run_id, folds, data.tags["state"], bool(data.params))
            history = client.get_metric_history(self._parent, "wall_hours")
            self._steps = max((point.step for point in history), default=0)
            metrics = client.get_run(self._parent).data.metrics
            self._counts = {state: metrics.get(f"trials_{state}", 0) for state in _COUNTED}
            # Only when all were read: a trial left out would get a second run.
            self._children = children
        return self._parent

    def sync(self, ledger: SearchLedger) -> None:
        """Brings children and the parent's figures up to date. Trials that the ledger does not know are removed.

        What fails is made up for by the next call.
        """
        parent = self._connect()
        client = self._registry.client
        try:
            for trial_id in [known for known in self._children if known not in ledger.trials]:
                client.delete_run(self._children[trial_id].run_id)
                del self._children[trial_id]
            for trial_id, entry in ledger.trials.items():
                self._sync_trial(parent, trial_id, entry)
            self._sync_parent(parent, ledger)
        except BaseException:
            # A call without an answer may have been carried out: what MLflow has is read anew.
            self._children.clear()
            raise

    def _sync_parent(self, parent: str, ledger: SearchLedger) -> None:
        counts = {state: ledger.count(state) for state in _COUNTED}
        folds = sum(len(entry.folds) for entry in ledger.trials.values())
        figures: dict[str, float | None] = {}
        if counts != self._counts or folds > self._steps:
            figures |= {f"trials_{state}": count for state, count in counts.items()}
        if folds > self._steps:
            best = ledger.best()
            figures |= {
                f"best_{METRIC}": best.score if best else None,
                "wall_hours": ledger.wall_seconds / 3600,
                "cpu_hours": ledger.cpu_seconds / 3600,
                "gpu_hours": ledger.gpu_seconds / 3600,
            }
        if figures:
            self._registry.log_metrics(parent, figures, first_step=folds)
        self._steps, self._counts = max(folds, self._steps), counts

    def _sync_trial(self, parent: str, trial_id: str, entry: TrialEntry) -> None:
        registry, client = self._registry, self._registry.client
        if trial_id not in self._children:
            tags = {_TRIAL: trial_id, "state": "running"}
            run_id = registry.start_child(parent, f"trial_{entry.number}", {}, tags)
            self._children[trial_id] = _Child(run_id, 0, "running", has_params=False)
        child = self._children[trial_id]
        if not child.has_params:
            registry.log_params(child.run_id, entry.params)
            child.has_params = True
        rows = []
        for count in range(child.folds + 1, len(entry.folds) + 1):
            fold, sofar = entry.folds[count - 1], entry.model_copy(update={"folds": entry.folds[:count]})
            row = {METRIC: sofar.score, "mean_auc": sofar.mean_auc, "fold_pauc": fold.pauc, "fold_auc": fold.auc}
            rows.append({**row, "fold_seconds": fold.seconds, "folds": count})
        registry.log_metrics(child.run_id, rows, first_step=child.folds)
        child.folds = len(entry.folds)
        if entry.state != child.state:
            if entry.error:
                client.set_tag(child.run_id, "error", entry.error[:500])
            elif "error" in client.get_run(child.run_id).data.tags:
                client.delete_tag(child.run_id, "error")
            if entry.state == "running":
                client.update_run(child.run_id, status="RUNNING")
            else:
                registry.finish(child.run_id, _STATUS[entry.state])
            # Last: as long as it differs, all of this is done again.
            client.set_tag(child.run_id, "state", entry.state)
            child.state = entry.state

    def log_files(self, folder: Path) -> None:
        """Copies a folder's files to the parent run."""
        self._registry.client.log_artifacts(self._connect(), str(folder))

    def finish(self, status: str) -> None:
        """Ends the parent run: FINISHED, FAILED or KILLED."""
        self._registry.finish(self._connect(), status)
