"""What a replica does once a second: it reads its gauges, and writes out the lines that Serve's logger holds back.

In throughput mode Serve's logger keeps up to 1000 lines below ERROR in memory: a warning of a quiet service would come
out hours later, and never if the replica is killed.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from logging.handlers import MemoryHandler

logger = logging.getLogger("ray.serve")

_INTERVAL_S = 1.0
# What asks a disk or the database is asked this seldom; Ray exports every 10 s.
_SLOW_INTERVAL_S = 10.0


def flush_log() -> None:
    """Writes out what Serve's logger holds back."""
    for handler in logger.handlers:
        if isinstance(handler, MemoryHandler):
            handler.flush()


class Sampler:
    """Reads what was added to it, from `start` to `stop`, on the event loop that calls `start`."""

    def __init__(self, interval_s: float = _INTERVAL_S, slow_interval_s: float = _SLOW_INTERVAL_S):
        self._interval_s = interval_s
        self._slow_interval_s = slow_interval_s
        self._quick: list[Callable[[], None]] = [flush_log]
        self._slow: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, read: Callable[[], None]) -> None:
        """`read` is called on the event loop once a second."""
        self._quick.append(read)

    def add_slow(self, read: Callable[[], None]) -> None:
        """`read` is called in a thread every ten seconds; it may block."""
        self._slow.append(read)

    def start(self) -> None:
        """Begins, once."""
        if self._task is None or self._task.done():
            # An empty context: in a request's, Serve would cancel the task with that one request.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    async def stop(self) -> None:
        """Ends, with the last lines written out."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        flush_log()

    async def sample(self, slow: bool = True) -> None:
        """Reads all once; what fails is a line of the log."""
        for read in self._quick:
            try:
                read()
            except Exception as error:
                logger.error("a figure cannot be read: %r", error)
        for read in self._slow if slow else ():
            try:
                await asyncio.to_thread(read)
            except Exception as error:
                logger.warning("a figure cannot be read: %r", error)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_slow = loop.time()
        while True:
            slow = loop.time() >= next_slow
            if slow:
                next_slow = loop.time() + self._slow_interval_s
            await self.sample(slow)
            await asyncio.sleep(self._interval_s)
