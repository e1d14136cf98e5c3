"""While a network learns, the executor that feeds it leaves the cores to it; and it never waits while there is work."""

from types import SimpleNamespace

import pytest
from ray.data._internal.execution.interfaces import PhysicalOperator

from data_pipelines import executor_pacing
from data_pipelines.executor_pacing import PAUSE_SECONDS, PauseUnderBackpressure


def operator(tasks, held_back):
    return SimpleNamespace(num_active_tasks=lambda: tasks, _in_task_output_backpressure=held_back)


@pytest.mark.parametrize(
    ("operators", "pauses"),
    [
        ([operator(0, False), operator(2, True)], 1),  # blocks wait for room
        ([operator(0, False), operator(0, False)], 1),  # all are read, the consumer is not done
        ([operator(0, True), operator(2, False)], 0),
        ([operator(1, True), operator(2, False)], 0),
    ],
)
def test_it_waits_only_when_no_task_can_give_anything(monkeypatch, operators, pauses):
    waited = []
    monkeypatch.setattr(executor_pacing.time, "sleep", waited.append)
    PauseUnderBackpressure().on_execution_step(SimpleNamespace(_topology=operators))
    assert waited == [PAUSE_SECONDS] * pauses


def test_rays_operators_have_what_it_looks_at():
    assert callable(PhysicalOperator.num_active_tasks)
    assert "_in_task_output_backpressure" in PhysicalOperator.__init__.__code__.co_names
