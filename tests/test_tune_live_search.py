"""The driver's view of a search: lines and ledger after every fold, cost of the trials that run, MLflow or not."""

import errno
import pickle
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial

from tune import live_search
from tune.driver_lease import DriverLease, SearchTakenOverError
from tune.json_files import read_json, write_json
from tune.live_search import LiveSearch
from tune.search_ledger import SearchLedger

PARAMS = {"optimizer.learning_rate": 0.001}


class Tracking:
    """Stands for MLflow, which may be away."""

    away = False
    message = "no answer\nfrom the server"

    def __init__(self):
        self.seen = []

    def sync(self, ledger):
        if self.away:
            raise ConnectionError(self.message)
        self.seen.append({entry.number: (entry.state, len(entry.folds)) for entry in ledger.entries()})


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


class Search:
    def __init__(self, url, ledger=None):
        write_json(url, (ledger or SearchLedger(num_trials=2, num_folds=2)).model_dump())
        self.url, self.lines, self.tracking, self.trials = url, [], Tracking(), []
        self.live = LiveSearch(url, DriverLease(f"{url}.driver"), self.tracking, self.lines.append, (1.0, 2.0))
        self.live.setup()

    def trial(self, number):
        tag = f"{number}_optimizer.learning_rate=0.0010"
        trial = SimpleNamespace(
            trial_id=f"id{number}", experiment_tag=tag, status=Trial.RUNNING, config=PARAMS, error_file=None
        )
        self.trials.append(trial)
        return trial

    def tell(self, event, trial, **more):
        getattr(self.live, f"on_trial_{event}")(iteration=0, trials=self.trials, trial=trial, **more)

    def fold(self, trial, folds, pauc):
        scores = {"folds": folds, "fold_pauc": pauc, "fold_auc": 0.9, "fold_seconds": 60.0, "carried_over": False}
        self.tell("result", trial, result=scores)

    def ledger(self):
        return SearchLedger.model_validate(read_json(self.url))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live_search, "time", clock)
    return clock


def test_every_fold_is_shown_and_kept(tmp_path, clock):
    search = Search(f"{tmp_path}/ledger.json")
    trial = search.trial(1)
    search.tell("start", trial)
    search.fold(trial, 1, 0.12)
    assert search.ledger().trials["id1"].folds[0].pauc == 0.12
    assert "trial 1 of 2 starts: learning_rate 0.001" in search.lines[0]
    assert "trial 1 of 2, fold 1 of 2: pAUC 0.1200" in search.lines[1]
    assert "best is trial 1: mean pAUC 0.1200 of 1 fold" in search.lines[2]
    search.tell("complete", trial)
    assert search.ledger().trials["id1"].state == "pruned" and "trial 1 is pruned: 1 of 2" in search.lines[-1]
    assert search.tracking.seen == [{1: ("running", 0)}, {1: ("running", 1)}, {1: ("pruned", 1)}]


def test_cost_is_that_of_the_trials_that_run_and_outlives_a_kill(tmp_path, clock):
    search = Search(f"{tmp_path}/ledger.json")
    running, ended = search.trial(1), search.trial(2)
    ended.status = Trial.TERMINATED
    for seconds in (10, 20):
        clock.now += seconds
        search.live.on_step_end(iteration=0, trials=search.trials)
    # Never told to save: killed here, it starts again from the file.
    clock.now += 5000
    again = Search(search.url, search.ledger())
    clock.now += 16
    again.live.on_step_end(iteration=0, trials=[running])
    kept = again.ledger()
    assert (kept.wall_seconds, kept.cpu_seconds, kept.gpu_seconds) == (46, 46, 92)


def test_a_search_goes_on_while_mlflow_is_away(tmp_path, clock):
    search = Search(f"{tmp_path}/ledger.json")
    trial = search.trial(1)
    search.tracking.away = True
    search.tell("start", trial)
    search.fold(trial, 1, 0.12)
    assert search.lines[-1] == "MLflow is not up to date: no answer"
    search.tracking.message = ""
    search.tell("start", trial)
    assert search.lines[-1] == "MLflow is not up to date: ConnectionError"
    search.tracking.away = False
    search.fold(trial, 2, 0.14)
    assert search.tracking.seen == [{1: ("running", 2)}]


def test_after_a_restart_nothing_is_shown_or_counted_twice(tmp_path, clock):
    first = Search(f"{tmp_path}/ledger.json")
    known, lost = first.trial(1), first.trial(2)
    for trial in (known, lost):
        first.tell("start", trial)
        first.fold(trial, 1, 0.12)
    again = Search(first.url, first.ledger())
    # Ray Tune's state is a few seconds old and does not know the second trial.
    again.live.on_step_begin(iteration=0, trials=[known])
    again.tell("start", known)
    lines = len(again.lines)
    again.fold(known, 1, 0.12)
    assert len(again.lines) == lines
    again.fold(known, 2, 0.14)
    assert list(again.ledger().trials) == ["id1"] and len(again.ledger().trials["id1"].folds) == 2
    assert "trial 2 was drawn just before" in again.lines[0] and "trial 1 of 2 goes on" in again.lines[1]


def test_a_failed_trial_says_why(tmp_path, clock):
    search = Search(f"{tmp_path}/ledger.json")
    trial = search.trial(1)
    search.tell("start", trial)
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback\nRuntimeError: out of memory\n")
    trial.error_file = str(tmp_path / "error.txt")
    search.tell("error", trial)
    assert search.ledger().trials["id1"].error == "RuntimeError: out of memory"
    assert search.lines[-1] == "trial 1 failed: RuntimeError: out of memory"


def test_a_trial_that_never_started_fails_like_any_other(tmp_path, clock):
    search = Search(f"{tmp_path}/ledger.json")
    trial = search.trial(2)
    search.tell("error", trial)
    entry = search.ledger().trials["id2"]
    assert (entry.number, entry.state, entry.params) == (2, "failed", PARAMS)
    assert search.lines == ["trial 2 failed: no message"]


def test_a_ledger_that_cannot_be_saved_for_a_while_loses_nothing(tmp_path, clock, monkeypatch):
    search = Search(f"{tmp_path}/ledger.json")
    trial = search.trial(1)
    search.tell("start", trial)

    def full(url, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(live_search, "write_json", full)
        search.fold(trial, 1, 0.12)
        assert search.lines[-1] == "the ledger is not saved: No space left on device; it is tried again"
        clock.now += 16
        search.live.on_step_end(iteration=0, trials=search.trials)
    assert search.ledger().trials["id1"].folds == []
    clock.now += 16
    search.live.on_step_end(iteration=0, trials=search.trials)
    assert search.ledger().trials["id1"].folds[0].pauc == 0.12

    with monkeypatch.context() as patch:
        patch.setattr(live_search, "write_json", full)
        search.fold(trial, 2, 0.14)
        search.tell("complete", trial)
        # What the job reports is read from the file: the last save must not be missing silently.
        with pytest.raises(OSError, match="No space left"):
            search.live.on_experiment_end(trials=search.trials)
    search.live.on_experiment_end(trials=search.trials)
    assert search.ledger().trials["id1"].state == "finished"


def test_a_driver_that_was_replaced_stops_and_writes_nothing_more(tmp_path, clock):
    search = Search(f"{tmp_path}/ledger.json")
    trial = search.trial(1)
    search.tell("start", trial)
    before, synced = search.ledger(), list(search.tracking.seen)
    write_json(f"{search.url}.driver", read_json(f"{search.url}.driver") | {"driver": "another", "host": "gpu-7"})
    search.fold(trial, 1, 0.12)
    with pytest.raises(SearchTakenOverError, match="on gpu-7.* has taken over this search"):
        search.live.on_step_end(iteration=0, trials=search.trials)
    assert search.ledger() == before and search.tracking.seen == synced


def test_what_ray_tune_pickles_holds_no_connection(tmp_path):
    from tune.search_tracking import SearchTracking

    tracking = SearchTracking(f"sqlite:///{tmp_path}/mlflow.db", "dermray", str(tmp_path), "4f1d")
    tracking._registry._connected = lambda: "a lambda cannot be pickled"
    assert pickle.loads(pickle.dumps(tracking))._settings == tracking._settings
