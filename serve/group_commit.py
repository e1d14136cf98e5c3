"""Many callers, one commit at a time: whatever arrived during a commit goes into the next one, without a timer."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class GroupCommit(Generic[Item, Result]):
    """Collects submitted items and commits them in order, in groups.

    Args:
        commit: takes a list of items and returns one result per item, in order; an exception instance among the results
            goes to that item's caller alone, a raised exception to all of them.
        size: what an item weighs, bytes.
        max_items, max_bytes: bounds of one group; a group has at least one item.
    """

    def __init__(
        self,
        commit: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]],
        size: Callable[[Item], int],
        max_items: int = 512,
        max_bytes: int = 32 * 2**20,
    ):
        self._commit = commit
        self._size = size
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._pending: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Returns once the item's group is committed; raises what became of it otherwise.

        A caller that is cancelled meanwhile leaves its item in the queue: it is committed all the same.
        """
        future = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        self._start()
        return await future

    def _start(self) -> None:
        if self._task is None or self._task.done():
            # An empty context: in the first caller's, Serve would cancel every later commit with that one request.
            self._task = asyncio.get_running_loop().create_task(self._drain(), context=contextvars.Context())
            self._task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("the commit task ended unexpectedly", exc_info=task.exception())
        if self._pending and not task.get_loop().is_closed():
            self._start()

    async def _drain(self) -> None:
        while self._pending:
            group = self._take()
            results: Sequence[Result | BaseException] = []
            try:
                results = await self._commit([item for item, _ in group])
                if len(results) != len(group):
                    raise RuntimeError(f"commit gave {len(results)} results for {len(group)} items")
            except Exception as error:
                results = [error] * len(group)
            except BaseException:
                results = [RuntimeError("the commit was cancelled")] * len(group)
                raise
            finally:
                for (_, future), result in zip(group, results, strict=True):
                    # Done already when its caller went away; setting it again would end this task.
                    if future.done():
                        continue
                    if isinstance(result, BaseException):
                        future.set_exception(result)
                    else:
                        future.set_result(result)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        group = [self._pending.popleft()]
        total = self._size(group[0][0])
        while self._pending and len(group) < self._max_items:
            total += self._size(self._pending[0][0])
            if total > self._max_bytes:
                break
            group.append(self._pending.popleft())
        return group
