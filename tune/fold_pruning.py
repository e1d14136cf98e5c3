"""ASHA between folds and Optuna over cross-validations, both of which survive a restart of the search."""

from __future__ import annotations

from typing import Any

from optuna.samplers import TPESampler
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tune.search_ledger import METRIC, mean_score


class FoldPruning(ASHAScheduler):
    """ASHA whose time is finished folds: after `grace_folds`, and `reduction_factor` times as many, and so on, a trial
    whose mean score is not among the best 1 / `reduction_factor` of those that came so far ends.

    Ray Tune does not save its scheduler: after a restart every trial would be the first of its rung and none would
    be pruned. The rungs are filled again from what the restored trials had reported (`fold_scores`).
    """

    def __init__(self, num_folds: int, grace_folds: int, reduction_factor: float, max_concurrent: int):
        super().__init__(
            time_attr="folds", max_t=num_folds, grace_period=grace_folds, reduction_factor=reduction_factor
        )
        self._max_concurrent = max_concurrent

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        added_before = trial.trial_id in self._trial_info
        super().on_trial_add(tune_controller, trial)
        if added_before:
            return
        if trial.status == Trial.TERMINATED:
            scores = (trial.last_result or {}).get("fold_scores", [])
            for folds in range(1, len(scores) + 1):
                super().on_trial_result(tune_controller, trial, {"folds": folds, METRIC: mean_score(scores[:folds])})
        elif trial.num_failures:
            # Restored after an error. Tune's limit of concurrent trials does not count it and all such trials would
            # start at once; paused, they wait for `choose_trial_to_run`.
            trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        # Reported again after a restart: the trial has begun its next fold, so it was judged before.
        return TrialScheduler.CONTINUE if result.get("judged") else decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        # Ray Tune saves every 10 s. A trial of recorded folds begins and ends sooner; after a kill the state would not
        # know it, and the search could not go on without forgetting it.
        tune_controller.checkpoint(force=True, wait=True)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is not None and chosen.status == Trial.PAUSED:
            active = [t for t in tune_controller.get_trials() if t.status in (Trial.PENDING, Trial.RUNNING)]
            if len(active) >= self._max_concurrent:
                return None
        return chosen


class FoldSearch(OptunaSearch):
    """Optuna's TPE, told which trials were pruned.

    Ray's searcher tells Optuna the last mean of a pruned trial as if it were a final score. The mean of an easy first
    fold can exceed every mean over all folds, and TPE would search around a trial that was thrown away. Told as pruned,
    TPE ranks it after the completed trials.
    """

    def __init__(self, num_folds: int, num_trials: int, max_concurrent: int, seed: int):
        # Optuna's ten random trials first would be all of a small search.
        sampler = TPESampler(
            seed=seed, n_startup_trials=min(10, max(4, num_trials // 3)), constant_liar=max_concurrent > 1
        )
        super().__init__(sampler=sampler)
        self._num_folds = num_folds
        self._reported: set[tuple[str, int]] = set()

    def _report(self, trial_id: str, result: dict[str, Any]) -> None:
        # A restarted trial reports its finished folds again, and one that had failed is closed for Optuna.
        step = (trial_id, result["folds"])
        if step not in self._reported and trial_id not in self._completed_trials:
            self._reported.add(step)
            self._ot_trials[trial_id].report(result[METRIC], result["folds"])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        if result and "folds" in result:
            self._report(trial_id, result)
            if result["folds"] < self._num_folds:
                result = None
        super().on_trial_complete(trial_id, result, error)
