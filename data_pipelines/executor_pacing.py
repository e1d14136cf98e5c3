"""Keeps Ray Data's executor from spinning while its consumer is the slower side."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

PAUSE_SECONDS = 0.05


class PauseUnderBackpressure(ExecutionCallback):
    """Waits a little after each step that leaves the executor nothing to wait for.

    The executor waits for tasks with something to give. When all have finished there is none, and a task whose blocks
    are held back always has something, so that the loop turns as fast as it can until the consumer has taken what is
    there: 0.3 to 0.4 of a core for every network in training, which learns more slowly than its pictures are read.
    A consumer that waits is the faster side: it gets its block without delay.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        _, output = executor._output_node
        if output.num_waiting_consumers > 0:
            return
        working = (operator for operator in executor._topology if operator.num_active_tasks() > 0)
        if all(operator._in_task_output_backpressure for operator in working):
            time.sleep(PAUSE_SECONDS)
