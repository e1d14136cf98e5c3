"""Many callers, few calls: what arrives while the calls under way take their time goes into the next, without a timer.

A call to another node costs milliseconds of CPU, whatever it carries; so does a commit.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from serve.request_ids import current_ids, join_ids, working_for

logger = logging.getLogger("ray.serve")

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Pending(NamedTuple, Generic[Item, Result]):
    """An item that waits, its caller's future, since when (`time.monotonic()`), and for which requests."""

    item: Item
    future: asyncio.Future[Result]
    since: float
    request_ids: tuple[str, ...]


class SharedCalls(Generic[Item, Result]):
    """Collects submitted items and hands them on in order, in groups; a call works for all the requests of its group.

    Args:
        call: takes a list of items and returns one result per item, in order; an exception instance among the results
            goes to that item's caller alone, a raised exception to all of them.
        size: what an item weighs: bytes, or pictures.
        max_items, max_size: bounds of one group; a group has at least one item.
        concurrency: most calls under way at a time.
        patience_s: how long an item waits for a call that is under way to end before another one is made for it.
        enough: with items of this size together, no one waits for others to come.
        keep_cancelled: whether an item whose caller went away is handed on all the same. Otherwise it is dropped, and a
            call that nobody waits for any more is cancelled.
    """

    def __init__(
        self,
        call: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]],
        size: Callable[[Item], int],
        max_items: int = 512,
        max_size: int = 32 * 2**20,
        concurrency: int = 1,
        patience_s: float = 0.0,
        enough: float = math.inf,
        keep_cancelled: bool = True,
    ):
        self._call = call
        self._size = size
        self._max_items = max_items
        self._max_size = max_size
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._enough = enough
        self._keep_cancelled = keep_cancelled
        self._pending: deque[_Pending[Item, Result]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def submit(self, item: Item) -> Result:
        """Returns the item's result once its group's call has ended; raises what became of it otherwise."""
        future = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(item, future, time.monotonic(), current_ids()))
        self._start()
        return await future

    def oldest_wait_s(self) -> float:
        """For how long the item that is next has waited for a call; 0.0 when none waits."""
        while self._pending and self._pending[0].future.done() and not self._keep_cancelled:
            self._pending.popleft()
        return time.monotonic() - self._pending[0].since if self._pending else 0.0

    def _start(self) -> None:
        if not self._pending or len(self._tasks) >= self._concurrency:
            return
        left = self._patience_s - self.oldest_wait_s() if self._tasks else 0.0
        if left > 0 and not self._has_enough():
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(left, self._on_timer, context=contextvars.Context())
        elif self._pending:
            # An empty context: in the first caller's, Serve would cancel every later call with that one request.
            task = asyncio.get_running_loop().create_task(self._drain(), context=contextvars.Context())
            self._tasks.add(task)
            task.add_done_callback(self._on_end)

    def _has_enough(self) -> bool:
        total = 0
        for waiting in self._pending:
            total += self._size(waiting.item) if self._keep_cancelled or not waiting.future.done() else 0
            if total >= self._enough:
                return True
        return False

    def _on_timer(self) -> None:
        self._timer = None
        self._start()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("the task behind shared calls ended unexpectedly", exc_info=task.exception())
        if not task.get_loop().is_closed():
            self._start()

    async def _drain(self) -> None:
        while group := self._take():
            # What did not fit may have waited long enough for a call of its own.
            self._start()
            results: Sequence[Result | BaseException] = []
            try:
                with working_for(join_ids(waiting.request_ids for waiting in group)):
                    results = await self._call_for(group)
                if len(results) != len(group):
                    raise RuntimeError(f"a call gave {len(results)} results for {len(group)} items")
            except Exception as error:
                results = [error] * len(group)
            except BaseException:
                results = [RuntimeError("the call was cancelled")] * len(group)
                raise
            finally:
                for (_, future, *_), result in zip(group, results, strict=True):
                    # Done already when its caller went away; setting it again would end this task.
                    if future.done():
                        continue
                    if isinstance(result, BaseException):
                        future.set_exception(result)
                    else:
                        future.set_result(result)

    async def _call_for(self, group: list[_Pending[Item, Result]]) -> Sequence[Result | Exception]:
        call = self._call([waiting.item for waiting in group])
        if self._keep_cancelled:
            return await call
        inner = asyncio.ensure_future(call)
        waiting = len(group)

        def on_done(_: asyncio.Future[Result]) -> None:
            nonlocal waiting
            waiting -= 1
            if waiting == 0:
                inner.cancel()

        for _, future, *_ in group:
            future.add_done_callback(on_done)
        try:
            return await inner
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                inner.cancel()
                raise
            return [RuntimeError("nobody waits for this call")] * len(group)

    def _take(self) -> list[_Pending[Item, Result]]:
        group: list[_Pending[Item, Result]] = []
        total = 0
        while self._pending and len(group) < self._max_items:
            waiting = self._pending[0]
            if waiting.future.done() and not self._keep_cancelled:
                self._pending.popleft()
                continue
            total += self._size(waiting.item)
            if group and total > self._max_size:
                break
            self._pending.popleft()
            group.append(waiting)
        return group
