"""While a network learns, the executor that feeds it leaves the cores to it; and it never waits while there is work."""

from types import SimpleNamespace

import pytest
import ray.data
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.execution.streaming_executor_state import OpState

from data_pipelines import executor_pacing
from data_pipelines.executor_pacing import PAUSE_SECONDS, PauseUnderBackpressure
from data_pipelines.image_dataset import data_context


def operator(tasks, held_back):
    return SimpleNamespace(num_active_tasks=lambda: tasks, _in_task_output_backpressure=held_back)


@pytest.mark.parametrize(
    ("operators", "num_waiting", "pauses"),
    [
        ([operator(0, False), operator(2, True)], 0, 1),  # blocks wait for room
        ([operator(0, False), operator(0, False)], 0, 1),  # all are read, the consumer is not done
        ([operator(0, True), operator(2, False)], 0, 0),
        ([operator(1, True), operator(2, False)], 0, 0),
        ([operator(0, False), operator(2, True)], 1, 0),  # a train worker has nothing to learn from
        ([operator(0, False), operator(0, False)], 2, 0),
    ],
)
def test_it_waits_only_when_no_task_can_give_anything_and_nobody_waits(monkeypatch, operators, num_waiting, pauses):
    waited = []
    monkeypatch.setattr(executor_pacing.time, "sleep", waited.append)
    output = SimpleNamespace(num_waiting_consumers=num_waiting)
    executor = SimpleNamespace(_topology=operators, _output_node=(operators[-1], output))
    PauseUnderBackpressure().on_execution_step(executor)
    assert waited == [PAUSE_SECONDS] * pauses


def test_rays_executor_has_what_it_looks_at():
    assert callable(PhysicalOperator.num_active_tasks)
    assert "_in_task_output_backpressure" in PhysicalOperator.__init__.__code__.co_names
    assert isinstance(OpState.num_waiting_consumers, property)
    executor = StreamingExecutor(ray.data.DataContext.get_current().copy())
    assert {"_topology", "_output_node"} <= set(vars(executor))


def test_every_data_set_of_pictures_is_streamed_with_it_and_the_callers_context_stays_as_it_was():
    class Callers(PauseUnderBackpressure):
        pass

    source = SimpleNamespace(rows_per_block=512, row_bytes=3 * 16 * 16)
    theirs = ray.data.DataContext.get_current().copy()
    theirs.custom_execution_callback_classes = [Callers]
    with ray.data.DataContext.current(theirs):
        context = data_context(source)
    # What Ray Data itself asks for when an execution starts.
    assert {Callers, PauseUnderBackpressure} <= set(context.execution_callback_classes)
    assert theirs.custom_execution_callback_classes == [Callers]
