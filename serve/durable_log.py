"""The ingress's side of the log: an answer may go out once its records are on disk, in the store or in the spool."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from monitoring.prediction_log import PredictionLog, PredictionRecord
from serve.drift_logger import Ack, LogEntry
from serve.settings import DriftLoggerSettings
from serve.shared_calls import SharedCalls
from serve.staged_images import StagedImages

# Serve's logger writes the replica's log file; in throughput mode it holds back what is below ERROR.
logger = logging.getLogger("ray.serve")


class Sidecar(Protocol):
    """The calls of the drift logger's handle."""

    async def write(self, entries: list[LogEntry]) -> Sequence[Ack | Exception]: ...

    async def find(self, caller: str, keys: list[str]) -> list[PredictionRecord | None]: ...

    async def ping(self) -> bool: ...


class LogUnavailableError(RuntimeError):
    """Neither the sidecar nor the spool took the records: nothing may be answered."""


class DurableLog:
    """Sends each ingress replica's records to the sidecar, one call at a time; spools while it does not answer.

    Args:
        sidecar: the drift logger.
        log: this node's log, for its spool and for the replay.
    """

    def __init__(self, sidecar: Sidecar, log: PredictionLog, settings: DriftLoggerSettings):
        self._sidecar = sidecar
        self._log = log
        self._settings = settings
        self._commits: SharedCalls[LogEntry, Ack] = SharedCalls(self._commit, size=lambda entry: entry.num_bytes)
        # Of their own: a database that hangs holds up the replay, and nothing but the disk holds up the spool.
        self._spool_thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._replay_thread = ThreadPoolExecutor(1, thread_name_prefix="replay")
        self._replay_task: asyncio.Task[None] | None = None
        self._staging = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._removal = ThreadPoolExecutor(1, thread_name_prefix="removal")
        self.spooling = False

    async def write(self, entry: LogEntry) -> Ack:
        """Returns once the entry's rows and images are on disk.

        Raises:
            LogUnavailableError: they are nowhere.
            PatientErasedError: they are nowhere either, since their patient was erased after they were received.
        """
        return await self._commits.submit(entry)

    def stage(self) -> StagedImages | None:
        """Where a request with many pictures puts them before it has their rows; None where that is not safe."""
        # No lock keeps removal and writing apart in a bucket: pictures of a failed request would be removed under the
        # next one. And while the store is away, they go to the spool.
        if self.spooling or not self._log.image_files.local:
            return None
        return StagedImages(self._log, self._staging, self._removal, self._settings.attempt_timeout_s)

    async def find(self, caller: str, keys: list[str]) -> list[PredictionRecord | None]:
        """Stored records under these idempotency keys; none while the sidecar does not answer.

        An answer under a key is made again then, under the same id: the store keeps the first.
        """
        if not self.spooling:
            try:
                return await asyncio.wait_for(self._sidecar.find(caller, keys), self._settings.attempt_timeout_s)
            except Exception as error:
                logger.error("the drift logger did not look up a key: %r", error)
        return [None] * len(keys)

    async def check(self) -> str:
        """ "ok": the store answers; "spooling": records go to the spool; else what is wrong with both."""
        try:
            await asyncio.wait_for(self._sidecar.ping(), self._settings.attempt_timeout_s)
        except Exception as error:
            logger.error("the drift logger is not ready: %r", error)
            directory = self._log.spool.directory
            existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
            return "spooling" if os.access(existing, os.W_OK) else f"no answer, and {directory} is not writable"
        return "spooling" if self.spooling else "ok"

    async def _commit(self, entries: list[LogEntry]) -> Sequence[Ack | Exception]:
        if not self.spooling:
            for attempt in range(1, self._settings.attempts + 1):
                try:
                    return await asyncio.wait_for(self._sidecar.write(entries), self._settings.attempt_timeout_s)
                except Exception as error:
                    logger.error("the drift logger did not answer (attempt %d): %r", attempt, error)
        records = [record for entry in entries for record in entry.records]
        images = {name: data for entry in entries for name, data in entry.images.items()}
        try:
            run = asyncio.get_running_loop().run_in_executor
            await run(self._spool_thread, self._log.spool_records, records, images)
        except OSError as error:
            raise LogUnavailableError(f"neither the store nor the spool takes records: {error}") from error
        self.spooling = True
        self.start_replay()
        return [None] * len(entries)

    def start_replay(self) -> None:
        """Empties the spool in the background, also what an earlier replica of this node left in it."""
        if self._replay_task is None or self._replay_task.done():
            # An empty context, so that the end of the request that noticed the failure does not cancel the replay.
            loop = asyncio.get_running_loop()
            self._replay_task = loop.create_task(self._replay(), context=contextvars.Context())

    async def _replay(self) -> None:
        while self.spooling or self._log.spool.pending():
            try:
                await asyncio.wait_for(self._sidecar.ping(), self._settings.attempt_timeout_s)
                run = asyncio.get_running_loop().run_in_executor
                replayed = await run(self._replay_thread, self._log.replay_spool)
                if replayed:
                    logger.warning("replayed %d spooled predictions to the store", replayed)
            except Exception as error:
                logger.warning("the spool waits: %r", error)
                await asyncio.sleep(self._settings.replay_interval_s)
            else:
                # Only now: a store that does not take the spool would not take new records either.
                self.spooling = False
