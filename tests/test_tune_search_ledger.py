"""Trials are compared over the same folds, counted once, and shown with what they cost."""

import json
import math

import pytest

from tune.search_ledger import SearchLedger, fold_line, mean_score, search_line, short_names


def ledger_of(scores, num_folds=3, num_trials=4):
    """Trials with these fold scores; those with fewer folds are pruned."""
    ledger = SearchLedger(num_trials=num_trials, num_folds=num_folds)
    for number, folds in enumerate(scores, 1):
        trial = f"t{number}"
        ledger.start(trial, number, {"optimizer.learning_rate": number / 1000, "sampling.negatives_per_positive": 3})
        for fold, pauc in enumerate(folds, 1):
            ledger.spend(3600, cpus=0.5, gpus=0)
            ledger.report(trial, fold, pauc, 0.9, 3600)
        ledger.end(trial)
    return ledger


def test_a_pruned_trial_is_never_the_best_however_easy_its_fold_was():
    # The first fold is easy: the pruned trial's mean of one fold is above every mean of three.
    ledger = ledger_of([[0.17, 0.12, 0.13], [0.16], [0.18, 0.13, 0.14]])
    assert ledger.trials["t2"].score > ledger.trials["t3"].score
    assert ledger.best().number == 3
    assert [entry.state for entry in ledger.entries()] == ["finished", "pruned", "finished"]


def test_a_pruned_trial_is_scored_against_the_same_fold_of_others():
    adjusted = ledger_of([[0.17, 0.12, 0.13], [0.16], [0.18, 0.13, 0.14]]).adjusted_scores()
    assert adjusted[1] == pytest.approx(0.14) and adjusted[3] == pytest.approx(0.15)
    # On its only fold it is 0.01 below trial 1.
    assert adjusted[2] == pytest.approx(0.13)


def test_undefined_scores_are_left_out():
    ledger = ledger_of([[math.nan, 0.12, 0.14], [math.nan], [0.1, 0.1, 0.1]])
    assert ledger.trials["t1"].score == pytest.approx(0.13)
    assert mean_score([math.nan]) == 0.0
    assert set(ledger.adjusted_scores()) == {1, 3}
    assert SearchLedger(num_trials=1, num_folds=1).adjusted_scores() == {}


def test_folds_reported_again_after_a_restart_count_once():
    ledger = ledger_of([[0.1, 0.1, 0.1], [0.1]])
    ledger = SearchLedger.model_validate(json.loads(json.dumps(ledger.model_dump())))
    ledger.start("t2", 2, {})
    assert ledger.count("running") == 1
    assert not ledger.report("t2", 1, 0.1, 0.9, 1)
    assert ledger.report("t2", 2, 0.2, 0.9, 1)
    assert [fold.pauc for fold in ledger.trials["t2"].folds] == [0.1, 0.2]
    assert [entry.number for entry in ledger.keep({"t1"})] == [2] and list(ledger.trials) == ["t1"]


def test_trials_that_are_over_are_never_forgotten():
    ledger = ledger_of([[0.1, 0.1, 0.1], [0.1]])
    ledger.start("t3", 3, {})
    with pytest.raises(RuntimeError, match=r"does not know trials that are finished or pruned \(1, 2\)"):
        ledger.keep(set())
    assert list(ledger.trials) == ["t1", "t2", "t3"]


def test_the_lines_say_what_came_what_it_cost_and_what_is_best():
    ledger = ledger_of([[0.17, 0.12, 0.13], [0.16]], num_trials=5)
    line = fold_line(ledger, ledger.trials["t1"])
    assert "trial 1 of 5, fold 3 of 3: pAUC 0.1300" in line and "3600 s" in line
    assert "folds 0.1700 0.1200 0.1300, mean 0.1400" in line and "learning_rate 0.001" in line
    assert "finished before" in fold_line(ledger, ledger.trials["t1"], carried_over=True)
    line = search_line(ledger)
    assert "1 finished, 1 pruned, 0 running, 3 to come" in line
    assert "4.00 h, workers 2.00 CPU-h;" in line
    assert "best is trial 1: mean pAUC 0.1400 of 3 folds (learning_rate 0.001, negatives_per_positive 3)" in line
    ledger.spend(1800, cpus=0, gpus=2)
    assert "2.00 CPU-h and 1.00 GPU-h" in search_line(ledger)
    ledger.start("t3", 3, {})
    ledger.end("t3", error="ValueError: out of memory")
    assert "1 failed" in search_line(ledger) and ledger.trials["t3"].error == "ValueError: out of memory"
    assert "best" not in search_line(SearchLedger(num_trials=1, num_folds=1))


def test_fields_that_end_alike_keep_their_sections():
    assert short_names(["a.rate", "b.rate", "c.size"]) == {"a.rate": "a.rate", "b.rate": "b.rate", "c.size": "size"}
