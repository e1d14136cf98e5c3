"""Follows a search from its driver: a progress line and the MLflow runs after every fold, the ledger on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from tune.driver_lease import DriverLease, SearchTakenOverError
from tune.json_files import read_json, write_json
from tune.search_ledger import SearchLedger, TrialEntry, fold_line, search_line, shown_params
from tune.search_tracking import SearchTracking

# How often the clock is saved between folds: a driver that is killed forgets at most this much of the cost.
SAVE_SECONDS = 15.0


def trial_number(trial: Trial) -> int:
    """1 for the first trial that was drawn, and so on; the same after a restart."""
    return int(trial.experiment_tag.split("_", 1)[0])


def trial_name(trial: Trial) -> str:
    """Names the trial's folder, its log lines and, with a fold added, its Ray Train runs."""
    return f"trial_{trial_number(trial)}_{trial.trial_id}"


class LiveSearch(Callback):
    """Ray Tune's callback in the driver. Ray Tune pickles it with the search and brings it back after a restart, so it
    holds settings only; what it knows is in the ledger's file.

    Args:
        ledger_url: where the ledger is kept; `run_search` has written it.
        lease: of the search; renewed whenever the ledger is saved.
        tracking: its parent run has been started.
        say: prints a line; importable, as it is pickled.
        held: CPUs and GPUs that the train workers of a running trial hold.
    """

    def __init__(
        self,
        ledger_url: str,
        lease: DriverLease,
        tracking: SearchTracking,
        say: Callable[[str], None],
        held: tuple[float, float],
    ):
        self._ledger_url, self._lease, self._tracking, self._say = ledger_url, lease, tracking, say
        self._held = held
        self._ledger: SearchLedger | None = None

    def setup(self, **_: Any) -> None:
        self._ledger = SearchLedger.model_validate(read_json(self._ledger_url))
        self._clock = self._saved = time.monotonic()
        self._checked = self._behind = False
        self._taken_over: SearchTakenOverError | None = None

    def on_step_begin(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        if self._checked:
            return
        self._checked = True
        for entry in self._ledger.keep({trial.trial_id for trial in trials}):
            self._say(f"trial {entry.number} was drawn just before the search stopped and is drawn again")
        self._publish()

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        now = time.monotonic()
        running = sum(trial.status == Trial.RUNNING for trial in trials)
        cpus, gpus = self._held
        self._ledger.spend(now - self._clock, running * cpus, running * gpus)
        self._clock = now
        if now - self._saved > SAVE_SECONDS:
            self._save()
        if self._taken_over is not None:
            raise self._taken_over

    def _save(self) -> None:
        try:
            self._lease.renew()
            write_json(self._ledger_url, self._ledger.model_dump())
            self._behind = False
        except SearchTakenOverError as error:
            # Raised at the step's end: Ray Tune would take an error in a trial's callback for the trial's own.
            self._taken_over = error
        except OSError as error:
            # As for MLflow below: the next save, seconds later, has all that this one lacks.
            self._behind = True
            self._say(f"the ledger is not saved: {error.strerror or error}; it is tried again")
        self._saved = time.monotonic()

    def _publish(self) -> None:
        self._save()
        if self._taken_over is not None:
            return
        try:
            self._tracking.sync(self._ledger)
        except Exception as error:  # noqa: BLE001
            # A search of days goes on while its log is away; the next fold, or the end, brings MLflow up to date.
            self._say(f"MLflow is not up to date: {(str(error).splitlines() or [type(error).__name__])[0]}")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        entry = self._ledger.start(trial.trial_id, trial_number(trial), trial.config)
        verb = "goes on" if entry.folds else "starts"
        self._say(f"trial {entry.number} of {self._ledger.num_trials} {verb}: {shown_params(entry.params)}")
        self._publish()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        ledger = self._ledger
        entry = ledger.trials[trial.trial_id]
        new = ledger.report(
            trial.trial_id, result["folds"], result["fold_pauc"], result["fold_auc"], result["fold_seconds"]
        )
        if not new:
            return
        self._say(fold_line(ledger, entry, result["carried_over"]))
        self._say(search_line(ledger))
        self._publish()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        entry = self._ended(trial)
        if entry.state == "pruned":
            self._say(f"trial {entry.number} is pruned: {len(entry.folds)} of {self._ledger.num_folds} folds trained")
        self._publish()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines() if trial.error_file else []
        entry = self._ended(trial, lines[-1] if lines else "no message")
        self._say(f"trial {entry.number} failed: {entry.error}")
        self._publish()

    def _ended(self, trial: Trial, error: str | None = None) -> TrialEntry:
        if trial.trial_id not in self._ledger.trials:
            # Its actor could not be started.
            self._ledger.start(trial.trial_id, trial_number(trial), trial.config)
        return self._ledger.end(trial.trial_id, error)

    def on_experiment_end(self, trials: list[Trial], **_: Any) -> None:
        # The search's outcome is read from the file.
        if self._behind and self._taken_over is None:
            self._lease.renew()
            write_json(self._ledger_url, self._ledger.model_dump())
