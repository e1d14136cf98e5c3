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
        writers: threads that wait for the disk.
        remover: a thread of its own, for a removal waits for whoever is writing, and for the database.
        timeout_s: how long a request waits for a disk that hangs; the commit then writes, or spools.
    """

    def __init__(self, log: PredictionLog, writers: Executor, remover: Executor, timeout_s: float):
        self._log = log
        self._writers = writers
        self._remover = remover
        self._timeout_s = timeout_s
        self._hashes: set[str] = set()
        self._writes: list[asyncio.Future[list[str]]] = []

    def add(self, images: Sequence[StoredImage]) -> None:
        """Starts writing."""
        # Of all that are handed over: a write that fails half way has written some.
        self._hashes.update(image.hash for image in images)
        run = asyncio.get_running_loop().run_in_executor
        self._writes.append(run(self._writers, self._log.image_files.put_many, [image.data for image in images]))

    async def on_disk(self) -> frozenset[str]:
        """Hashes of those that are on disk, once all were tried or the time is over."""
        found: set[str] = set()
        for write in await self._ended(self._timeout_s):
            if write.exception() is not None:
                logger.warning("pictures were not written ahead of their rows: %r", write.exception())
            else:
                found.update(write.result())
        return frozenset(found)

    async def _ended(self, timeout_s: float | None) -> set[asyncio.Future[list[str]]]:
        # Not gather: the end of the request must not cancel these, for their threads go on.
        return (await asyncio.wait(self._writes, timeout=timeout_s))[0] if self._writes else set()

    def abandon(self) -> None:
        """Removes in the background what no record names: the request failed."""
        if self._writes:
            # An empty context: this goes on when the request's own tasks are cancelled.
            task = asyncio.get_running_loop().create_task(self._remove(), context=contextvars.Context())
            _removals.add(task)
            task.add_done_callback(_removals.discard)

    async def _remove(self) -> None:
        await self._ended(None)
        try:
            await asyncio.get_running_loop().run_in_executor(self._remover, self._log.remove_unnamed, self._hashes)
        except Exception as error:
            logger.error("%d pictures of a request that failed are kept: %r", len(self._hashes), error)


# A task that nothing refers to may be collected before it ends.
_removals: set[asyncio.Task[None]] = set()
