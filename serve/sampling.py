"""What a replica does every few seconds: it reads its gauges, passes its figures on to Ray, and writes out the lines
that Serve's logger holds back.

In throughput mode Serve's logger keeps up to 1000 lines below ERROR in memory: a warning of a quiet service would come
out hours later, and never if the replica is killed.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from logging.handlers import MemoryHandler

from serve.metrics import Recorder

logger = logging.getLogger("ray.serve")

_LOG_INTERVAL_S = 1.0
# Ray exports every 10 s.
_INTERVAL_S = 5.0


def flush_log() -> None:
    """Writes out what Serve's logger holds back."""
    for handler in logger.handlers:
        if isinstance(handler, MemoryHandler):
            handler.flush()


class Sampler:
    """Reads what was added to it, from `start` to `stop`, on the event loop that calls `start`."""

    def __init__(self, metrics: Recorder, interval_s: float = _INTERVAL_S, log_interval_s: float = _LOG_INTERVAL_S):
        self._metrics = metrics
        self._interval_s = interval_s
        self._log_interval_s = log_interval_s
        self._quick: list[Callable[[], None]] = []
        self._blocking: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, read: Callable[[], None], blocking: bool = False) -> None:
        """`read` is called every five seconds: on the event loop, or in a thread if it may block."""
        (self._blocking if blocking else self._quick).append(read)

    def start(self) -> None:
        """Begins, once."""
        if self._task is None or self._task.done():
            # An empty context: in a request's, Serve would cancel the task with that one request.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    async def stop(self) -> None:
        """Ends, with the last lines and figures passed on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._metrics.flush()
        flush_log()

    async def sample(self) -> None:
        """Reads all and passes it on; what fails is a line of the log, and holds up no other."""
        for read in self._quick:
            try:
                read()
            except Exception as error:
                logger.error("a figure cannot be read: %r", error)
        for read in self._blocking:
            try:
                await asyncio.to_thread(read)
            except Exception as error:
                logger.warning("a figure cannot be read: %r", error)
        try:
            self._metrics.flush()
        except Exception as error:
            logger.error("figures cannot be told to Ray: %r", error)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if loop.time() >= due:
                due = loop.time() + self._interval_s
                await self.sample()
            flush_log()
            await asyncio.sleep(self._log_interval_s)
