"""Calls that wait for a disk or a network, made at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any


class SideBySide:
    """Threads that start with the first work for them.

    Args:
        num_threads: calls at a time.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str):
        self._num_threads = num_threads
        self._name = name

    def map(self, work: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """As the built-in `map`. When one call raises, the others have ended too: nothing goes on behind the caller's
        back."""
        if len(arguments[0]) < 2:
            return list(map(work, *arguments))
        futures = [self._threads.submit(work, *items) for items in zip(*arguments, strict=True)]
        wait(futures)
        return [future.result() for future in futures]

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix=self._name)
