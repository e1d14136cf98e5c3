"""One parent run with a child per trial, whatever is cut off and started again."""

import pytest

from modeling.registry import Registry
from tests.test_tune_search_ledger import ledger_of
from tune.search_ledger import SearchLedger
from tune.search_tracking import SearchTracking


@pytest.mark.timeout(600)
def test_a_restarted_search_adds_nothing_twice(tmp_path):
    settings = (f"sqlite:///{tmp_path}/mlflow.db", "dermray", str(tmp_path / "artifacts"))
    registry = Registry(*settings)

    def tracking():
        return SearchTracking(*settings, search_id="4f1d")

    first = tracking()
    parent = first.start("night", {"num_trials": 4})
    ledger = ledger_of([[0.17, 0.12, 0.13], [0.16]])
    lost = ledger.start("lost", 3, {"optimizer.learning_rate": 0.1})
    first.sync(ledger)
    unreliable = Unreliable(registry.client, 1, carried_out=False)
    unreliable.WRITES = ("get_metric_history",)
    half = tracking()
    half._registry._connected = unreliable
    with pytest.raises(ConnectionError):
        half.sync(ledger)
    half.sync(ledger)
    first.sync(ledger)
    assert len(registry.children(parent)) == 3
    assert {run.info.run_name for run in registry.children(parent)} == {"trial_1", "trial_2", "trial_3"}

    again = tracking()
    assert again.start("night", {"num_trials": 4}) == parent
    assert registry.client.get_run(parent).info.status == "RUNNING"
    assert ledger.keep({"t1", "t2"}) == [lost]
    ledger.start("t3", 3, {"optimizer.learning_rate": 0.2})
    ledger.report("t3", 1, 0.18, 0.9, 60)
    again.sync(ledger)
    ledger.end("t3", error="RuntimeError: out of memory")
    again.sync(ledger)
    again.finish("FINISHED")

    children = {run.info.run_name: run for run in registry.children(parent)}
    assert len(registry.children(parent)) == 3
    states = {name: (run.data.tags["state"], run.info.status) for name, run in children.items()}
    assert states == {
        "trial_1": ("finished", "FINISHED"),
        "trial_2": ("pruned", "FINISHED"),
        "trial_3": ("failed", "FAILED"),
    }
    assert children["trial_3"].data.tags["error"] == "RuntimeError: out of memory"
    assert children["trial_3"].data.params["optimizer.learning_rate"] == "0.2"
    points = registry.client.get_metric_history(children["trial_1"].info.run_id, "mean_pauc")
    assert [(point.step, round(point.value, 4)) for point in points] == [(0, 0.17), (1, 0.145), (2, 0.14)]
    steps = [point.step for point in registry.client.get_metric_history(parent, "cpu_hours")]
    assert steps == [4, 5]
    assert registry.client.get_run(parent).info.status == "FINISHED"
    # Another search of the same name, as after its folder was deleted, leaves these runs alone.
    other = SearchTracking(*settings, search_id="77aa")
    assert other.start("night", {}) != parent
    other.sync(SearchLedger(num_trials=1, num_folds=1))
    assert len(registry.children(parent)) == 3


class Unreliable:
    """MLflow's client whose write number `failing` fails, before or after it was carried out."""

    WRITES = ("create_run", "log_batch", "log_dict", "set_tag", "delete_tag", "update_run", "set_terminated")

    def __init__(self, client, failing, carried_out):
        self.client, self.left, self.carried_out = client, failing, carried_out

    def __getattr__(self, name):
        method = getattr(self.client, name)
        return (lambda *args, **more: self.write(method, args, more)) if name in self.WRITES else method

    def write(self, method, args, more):
        self.left -= 1
        if self.left != -1:
            return method(*args, **more)
        if self.carried_out:
            method(*args, **more)
        raise ConnectionError("no answer")


def logged(registry, parent):
    """All that MLflow has of a search, without ids and times."""
    client = registry.client

    def steps(run):
        names = sorted(client.get_run(run).data.metrics)
        return {name: [point.step for point in client.get_metric_history(run, name)] for name in names}

    children = []
    for run in sorted(registry.children(parent), key=lambda run: run.info.run_name):
        tags = {name: run.data.tags.get(name) for name in ("dermray.trial", "state", "error")}
        files = [item.path for item in client.list_artifacts(run.info.run_id)]
        children.append((run.info.run_name, run.info.status, run.data.params, tags, steps(run.info.run_id), files))
    run = client.get_run(parent)
    counts = {name: value for name, value in run.data.metrics.items() if name.startswith("trials_")}
    return children, run.data.params, counts, steps(parent)


@pytest.mark.parametrize("carried_out", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_whatever_call_fails_the_next_sync_makes_up_for_it(tmp_path, carried_out):
    settings = (f"sqlite:///{tmp_path}/mlflow.db", "dermray", str(tmp_path / "artifacts"))
    registry = Registry(*settings)
    ledger = ledger_of([[0.17, 0.12, 0.13]])
    ledger.start("t2", 2, {"optimizer.learning_rate": 0.1})
    ledger.report("t2", 1, 0.1, 0.9, 60)

    def tracked(failing):
        """What a search with this failing call leaves; whether it came to that call."""
        failed = False
        tracking = SearchTracking(*settings, search_id=f"{failing}-{carried_out}")
        tracking._registry._connected = unreliable = Unreliable(registry.client, failing, carried_out)
        searched = ledger.model_copy(deep=True)
        begun = [lambda: tracking.start("night", {"num_trials": 4}), lambda: tracking.sync(searched)]
        for error in ("RuntimeError: out of memory", None):
            # Fails, is tried again, and ends as pruned.
            begun.append(lambda error=error: (searched.end("t2", error), tracking.sync(searched)))
            begun.append(lambda: tracking.sync(searched))
        for step in begun:
            try:
                step()
            except ConnectionError:
                failed = True
                step()
        assert unreliable.left < 0 or not failed
        return logged(registry, tracking._parent), failed

    expected, _ = tracked(failing=10_000)
    assert expected[2] == {"trials_finished": 1, "trials_pruned": 1, "trials_failed": 0}
    assert [(name, status, tags["state"], tags["error"]) for name, status, _, tags, *_ in expected[0]] == [
        ("trial_1", "FINISHED", "finished", None),
        ("trial_2", "FINISHED", "pruned", None),
    ]
    failing, failed = 0, True
    while failed:
        left, failed = tracked(failing)
        assert left == expected, f"after the failure of write {failing}"
        failing += 1
    assert failing > 15
