"""What a search knows about its trials: fold scores, states, cost, the best so far. Kept in a file after every fold, so
that a restarted search goes on counting, and that anyone can look while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

METRIC = "mean_pauc"


def mean_score(scores: Sequence[float]) -> float:
    """Mean of the defined fold scores; 0, the worst pAUC, where no fold has one (a fold of one class)."""
    finite = [score for score in scores if math.isfinite(score)]
    return float(np.mean(finite)) if finite else 0.0


class FoldScore(BaseModel):
    """One finished fold. `seconds` as trained; the other figures are the whole search's when the fold was reported."""

    model_config = ConfigDict(extra="forbid")

    pauc: float
    auc: float
    seconds: float
    wall_hours: float
    cpu_hours: float
    gpu_hours: float


class TrialEntry(BaseModel):
    """A trial. `params`: space field -> number or choice label. `error`: the last line of what it failed with."""

    model_config = ConfigDict(extra="forbid")

    number: int
    params: dict[str, Any]
    state: Literal["running", "finished", "pruned", "failed"] = "running"
    folds: list[FoldScore] = Field(default_factory=list)
    error: str | None = None

    @property
    def score(self) -> float:
        """Mean pAUC of the finished folds."""
        return mean_score([fold.pauc for fold in self.folds])

    @property
    def mean_auc(self) -> float:
        return mean_score([fold.auc for fold in self.folds])


class SearchLedger(BaseModel):
    """All trials by Ray Tune's trial id, in the order of their numbers, and what they cost.

    Attributes:
        at_a_time: trials that run at a time.
        wall_seconds: how long the search has run, without the time between a stop and a restart.
        cpu_seconds, gpu_seconds: CPUs and GPUs of train workers times the seconds their trials ran, cut off folds
            included.
    """

    model_config = ConfigDict(extra="forbid")

    num_trials: int
    num_folds: int
    at_a_time: int = 1
    trials: dict[str, TrialEntry] = Field(default_factory=dict)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def spend(self, seconds: float, cpus: float, gpus: float) -> None:
        """Adds time in which trials held so many CPUs and GPUs."""
        self.wall_seconds += seconds
        self.cpu_seconds += seconds * cpus
        self.gpu_seconds += seconds * gpus

    def keep(self, trial_ids: set[str]) -> list[TrialEntry]:
        """Forgets and returns trials that Ray Tune, restarted from a state of some seconds before, does not know.

        Raises:
            RuntimeError: one of them is finished or pruned; its result would be lost.
        """
        gone = {trial_id: entry for trial_id, entry in self.trials.items() if trial_id not in trial_ids}
        over = sorted(entry.number for entry in gone.values() if entry.state in ("finished", "pruned"))
        if over:
            shown = ", ".join(str(number) for number in over)
            raise RuntimeError(
                f"Ray Tune's state does not know trials that are finished or pruned ({shown}); the search stops rather "
                "than forget them: bring its folder's tune/ back as it was, or start another search"
            )
        for trial_id in gone:
            del self.trials[trial_id]
        return list(gone.values())

    def start(self, trial_id: str, number: int, params: dict[str, Any]) -> TrialEntry:
        """The trial's entry, made where there is none; a trial that goes on after a restart runs again."""
        entry = self.trials.setdefault(trial_id, TrialEntry(number=number, params=params))
        entry.state, entry.error = "running", None
        return entry

    def report(self, trial_id: str, folds: int, pauc: float, auc: float, seconds: float) -> bool:
        """Notes a trial's `folds`-th fold; False where it was noted before, by an earlier run of the search."""
        entry = self.trials[trial_id]
        if folds <= len(entry.folds):
            return False
        assert folds == len(entry.folds) + 1, f"trial {entry.number} reported fold {folds} after {len(entry.folds)}"
        hours = [spent / 3600 for spent in (self.wall_seconds, self.cpu_seconds, self.gpu_seconds)]
        entry.folds.append(
            FoldScore(pauc=pauc, auc=auc, seconds=seconds, wall_hours=hours[0], cpu_hours=hours[1], gpu_hours=hours[2])
        )
        return True

    def end(self, trial_id: str, error: str | None = None) -> TrialEntry:
        """Closes a trial: failed with an error, finished with all folds, else pruned."""
        entry = self.trials[trial_id]
        entry.error = error
        entry.state = "failed" if error else "finished" if len(entry.folds) == self.num_folds else "pruned"
        return entry

    def entries(self) -> list[TrialEntry]:
        return sorted(self.trials.values(), key=lambda entry: entry.number)

    def count(self, state: str) -> int:
        return sum(entry.state == state for entry in self.trials.values())

    def best(self) -> TrialEntry | None:
        """The trial with the best mean among those with the most folds: a mean over fewer folds does not compare, as
        folds differ. None before the first fold."""
        scored = [entry for entry in self.entries() if entry.folds]
        return max(scored, key=lambda entry: (len(entry.folds), entry.score), default=None)

    def adjusted_scores(self) -> dict[int, float]:
        """Trial number -> mean pAUC as if each trial had trained all folds.

        Least squares of score = trial + fold (Yates 1933 for incomplete tables): a pruned trial's fold is compared with
        the same fold of others. A trial with all folds keeps its mean. Trials without a defined score are left out.
        """
        points = [
            (entry.number, fold, score.pauc)
            for entry in self.entries()
            for fold, score in enumerate(entry.folds)
            if math.isfinite(score.pauc)
        ]
        if not points:
            return {}
        numbers = sorted({number for number, _, _ in points})
        folds = sorted({fold for _, fold, _ in points})
        design = np.zeros((len(points) + 1, len(numbers) + len(folds)))
        for row, (number, fold, _) in enumerate(points):
            design[row, numbers.index(number)] = design[row, len(numbers) + folds.index(fold)] = 1.0
        # The folds' effects add up to 0, which makes a trial's effect its mean over all folds.
        design[-1, len(numbers) :] = 1.0
        effects = np.linalg.lstsq(design, np.array([pauc for _, _, pauc in points] + [0.0]), rcond=None)[0]
        return {number: float(effects[position]) for position, number in enumerate(numbers)}


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Space field -> its last part, or all of it where two fields end alike."""
    lasts = [field.rsplit(".", 1)[-1] for field in fields]
    return {field: last if lasts.count(last) == 1 else field for field, last in zip(fields, lasts, strict=True)}


def shown_params(params: dict[str, Any]) -> str:
    """A trial's values in one line."""
    names = short_names(list(params))
    return ", ".join(
        f"{names[field]} {value:.3g}" if isinstance(value, float) else f"{names[field]} {value}"
        for field, value in params.items()
    )


def fold_line(ledger: SearchLedger, entry: TrialEntry, carried_over: bool = False) -> str:
    """What one fold of a trial gave."""
    fold = entry.folds[-1]
    number = len(entry.folds)
    cost = "finished before" if carried_over else f"{fold.seconds:.0f} s"
    scores = " ".join(f"{score.pauc:.4f}" for score in entry.folds)
    return (
        f"trial {entry.number} of {ledger.num_trials}, fold {number} of {ledger.num_folds}: pAUC {fold.pauc:.4f}, "
        f"AUC {fold.auc:.3f}, {cost}; folds {scores}, mean {entry.score:.4f} ({shown_params(entry.params)})"
    )


def search_line(ledger: SearchLedger) -> str:
    """Where the search stands: trials, cost, best so far."""
    left = ledger.num_trials - len(ledger.trials)
    counts = [f"{ledger.count(state)} {state}" for state in ("finished", "pruned", "failed", "running")]
    counts = [text for text in counts if not text.startswith("0 failed")]
    cost = f"{ledger.wall_seconds / 3600:.2f} h, workers {ledger.cpu_seconds / 3600:.2f} CPU-h"
    if ledger.gpu_seconds:
        cost += f" and {ledger.gpu_seconds / 3600:.2f} GPU-h"
    best = ledger.best()
    text = f"search: trials {', '.join(counts)}, {left} to come; {cost}"
    if best is None:
        return text
    folds = f"{len(best.folds)} fold" + ("s" if len(best.folds) > 1 else "")
    return f"{text}; best is trial {best.number}: mean pAUC {best.score:.4f} of {folds} ({shown_params(best.params)})"


def outcomes_line(ledger: SearchLedger) -> str:
    """How many trials ended how."""
    counts = [f"{ledger.count(state)} {state}" for state in ("finished", "pruned", "failed") if ledger.count(state)]
    return f"{len(ledger.trials)} trials: {', '.join(counts)}"
