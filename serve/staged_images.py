"""Pictures of one request, put on disk while the network still looks at others of it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Sequence
from concurrent.futures import Executor

from monitoring.prediction_log import PredictionLog
from store.image_files import StoredImage

logger = logging.getLogger("ray.serve")


class StagedImages:
    """Writes pictures ahead of the rows that will name them; who commits the rows writes what is missing.

    Args:
        log: where the pictures belong.
        threads: that wait for the disk.
    """

    def __init__(self, log: PredictionLog, threads: Executor):
        self._log = log
        self._threads = threads
        self._writes: list[asyncio.Future[list[str]]] = []

    def add(self, images: Sequence[StoredImage]) -> None:
        """Starts writing."""
        run = asyncio.get_running_loop().run_in_executor
        self._writes.append(run(self._threads, self._log.image_files.put_many, [image.data for image in images]))

    async def on_disk(self) -> frozenset[str]:
        """Hashes of those that are on disk, once all were tried."""
        found: set[str] = set()
        for result in await asyncio.gather(*self._writes, return_exceptions=True):
            if isinstance(result, BaseException):
                logger.warning("pictures were not written ahead of their rows: %r", result)
            else:
                found.update(result)
        return frozenset(found)

    def abandon(self) -> None:
        """Removes in the background what no record names: the request failed."""
        if self._writes:
            # An empty context: this goes on when the request's own tasks are cancelled.
            task = asyncio.get_running_loop().create_task(self._remove(), context=contextvars.Context())
            _removals.add(task)
            task.add_done_callback(_removals.discard)

    async def _remove(self) -> None:
        hashes = await self.on_disk()
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._log.remove_unnamed, hashes)
        except Exception as error:
            logger.error("%d pictures of a request that failed are kept: %r", len(hashes), error)


# A task that nothing refers to may be collected before it ends.
_removals: set[asyncio.Task[None]] = set()
