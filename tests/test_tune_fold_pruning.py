"""Pruning between folds and Optuna's view of it, before and after a restart; Ray Tune's classes without a cluster."""

from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tune.fold_pruning import FoldPruning, FoldSearch
from tune.search_ledger import METRIC, mean_score

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


def a_trial(name, status=Trial.PENDING, scores=(), num_failures=0):
    trial = SimpleNamespace(trial_id=name, status=status, num_failures=num_failures)
    trial.last_result = {"fold_scores": list(scores)} if scores else {}
    trial.set_status = lambda new: setattr(trial, "status", new)
    return trial


def pruning(num_folds=4, max_concurrent=1):
    scheduler = FoldPruning(num_folds, grace_folds=1, reduction_factor=2, max_concurrent=max_concurrent)
    scheduler.set_search_properties(METRIC, "max")
    return scheduler


def report(scheduler, trial, scores, **more):
    return scheduler.on_trial_result(None, trial, {"folds": len(scores), METRIC: mean_score(scores), **more})


def test_one_trial_at_a_time_is_pruned_against_those_before_it():
    scheduler = pruning()
    first, poor, good = a_trial("a"), a_trial("b"), a_trial("c")
    for trial in (first, poor, good):
        scheduler.on_trial_add(None, trial)
    assert [report(scheduler, first, [0.15] * folds) for folds in (1, 2, 3)] == [CONTINUE] * 3
    assert report(scheduler, poor, [0.1]) == STOP
    assert report(scheduler, good, [0.16]) == CONTINUE
    # The second rung is at two folds: it fell behind the first trial.
    assert report(scheduler, good, [0.16, 0.1]) == STOP


def test_after_a_restart_a_poor_trial_is_pruned_as_before_it():
    scheduler = pruning()
    scheduler.on_trial_add(None, a_trial("a", Trial.TERMINATED, [0.15, 0.14, 0.13, 0.12]))
    poor, late = a_trial("b"), a_trial("c")
    scheduler.on_trial_add(None, poor)
    scheduler.on_trial_add(None, late)
    assert report(scheduler, poor, [0.1]) == STOP
    assert report(scheduler, late, [0.16]) == CONTINUE
    assert report(scheduler, late, [0.16, 0.12]) == STOP  # 0.14 < 0.145, the finished trial's mean of two folds


def test_a_fold_judged_before_the_restart_is_not_judged_again():
    scheduler = pruning()
    scheduler.on_trial_add(None, a_trial("a", Trial.TERMINATED, [0.15, 0.14, 0.13, 0.12]))
    cut_off = a_trial("b")
    scheduler.on_trial_add(None, cut_off)
    assert report(scheduler, cut_off, [0.1], judged=True) == CONTINUE
    assert report(scheduler, cut_off, [0.1, 0.1]) == STOP


def test_the_end_of_a_trial_is_saved_at_once():
    saved = []
    controller = SimpleNamespace(checkpoint=lambda **how: saved.append(how))
    scheduler, trial = pruning(), a_trial("a")
    scheduler.on_trial_add(controller, trial)
    report(scheduler, trial, [0.15])
    assert saved == []
    scheduler.on_trial_complete(controller, trial, {"folds": 4, METRIC: 0.15})
    assert saved == [{"force": True, "wait": True}]


def test_trials_restored_after_an_error_wait_for_their_turn():
    scheduler = pruning(max_concurrent=1)
    running, failed, other = a_trial("a", Trial.RUNNING), a_trial("b", num_failures=1), a_trial("c", num_failures=1)
    for trial in (running, failed, other):
        scheduler.on_trial_add(None, trial)
    controller = SimpleNamespace(get_trials=lambda: [running, failed, other])
    assert [failed.status, other.status] == [Trial.PAUSED] * 2
    assert scheduler.choose_trial_to_run(controller) is None
    running.status = Trial.TERMINATED
    assert scheduler.choose_trial_to_run(controller) is failed
    failed.status = Trial.RUNNING
    # A retry within one run of the search keeps its place.
    scheduler.on_trial_add(None, failed)
    assert failed.status == Trial.RUNNING


def search(num_trials=6):
    searcher = FoldSearch(num_folds=2, num_trials=num_trials, max_concurrent=1, seed=3)
    searcher.set_search_properties(METRIC, "max", {"optimizer.learning_rate": tune.loguniform(1e-4, 1e-2)})
    return searcher


def run_trial(searcher, name, scores):
    params = searcher.suggest(name)
    for folds in range(1, len(scores)):
        searcher.on_trial_result(name, {"folds": folds, METRIC: mean_score(scores[:folds])})
    searcher.on_trial_complete(name, {"folds": len(scores), METRIC: mean_score(scores)})
    return params["optimizer.learning_rate"]


def test_optuna_is_told_which_trials_were_pruned():
    searcher = search()
    run_trial(searcher, "a", [0.15, 0.11])
    run_trial(searcher, "b", [0.14])
    searcher.suggest("c")
    searcher.on_trial_complete("c", error=True)
    states = [(trial.state, trial.value) for trial in searcher._ot_study.trials]
    assert states == [
        (TrialState.COMPLETE, pytest.approx(0.13)),
        (TrialState.PRUNED, 0.14),
        (TrialState.FAIL, None),
    ]
    # The pruned trial's single easy fold does not beat the finished one.
    assert searcher._ot_study.best_trial.number == 0


def test_a_restored_search_proposes_what_the_uninterrupted_one_would_have(tmp_path):
    scores = [[0.15, 0.11], [0.14], [0.16, 0.13], [0.16, 0.15], [0.1], [0.12]]
    uninterrupted = search()
    expected = [run_trial(uninterrupted, str(number), scores[number]) for number in range(6)]

    before = search()
    drawn = [run_trial(before, str(number), scores[number]) for number in range(4)]
    drawn.append(before.suggest("4")["optimizer.learning_rate"])
    before.on_trial_result("4", {"folds": 1, METRIC: 0.1})
    before.save(str(tmp_path / "searcher.pkl"))
    after = search()
    after.restore(str(tmp_path / "searcher.pkl"))
    # The trial that was cut off reports its finished fold again.
    after.on_trial_result("4", {"folds": 1, METRIC: 0.1})
    after.on_trial_complete("4", {"folds": 1, METRIC: 0.1})
    drawn.append(run_trial(after, "5", scores[5]))
    assert drawn == expected
    assert [trial.state for trial in after._ot_study.trials].count(TrialState.PRUNED) == 3
