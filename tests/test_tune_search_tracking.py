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
    first.sync(ledger)
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
