"""The sidecar: commits what the ingress replicas answered, for the log that drift is measured on.

Images first, then one transaction for everything that waits; a call returns once its rows are on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from monitoring.alarm_channels import ServiceAlarmSettings
from monitoring.prediction_log import PredictionLog, PredictionRecord
from serve.alarm_sender import AlarmSender
from serve.image_sweeper import ImageSweeper
from serve.metrics import LOG_COMMIT_ROWS, LOG_COMMIT_SECONDS, SUBMISSIONS_PENDING, Recorder, replica_metrics
from serve.private_ports import listen_on_node_address
from serve.request_ids import show_ids_in_log, watched_call
from serve.sampling import Sampler
from serve.settings import DriftLoggerSettings, StorageSettings
from serve.shared_calls import SharedCalls
from serve.store_gauges import StoreGauges
from store.database import StoreUnavailableError
from store.erased_patients import PatientErasedError
from store.submissions import count_pending

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class LogEntry:
    """What one HTTP request leaves in the log: its records, and their images (stored bytes by hash).

    `on_disk`: which of the images were written already, and may have been removed since.
    """

    records: tuple[PredictionRecord, ...]
    images: dict[str, bytes]
    on_disk: frozenset[str] = frozenset()

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.images.values())) + 2048 * len(self.records)


Ack = tuple[PredictionRecord, ...] | None
"""A committed entry: None = as it was sent. With idempotency keys: its records as stored, which an earlier request
under the same key may have written, so that two requests with one key get one answer."""


def open_log(storage: StorageSettings) -> PredictionLog:
    """The prediction log at these places; the database is opened on first use."""
    return PredictionLog(storage.store_url, storage.images_url, storage.spool_dir)


class DriftLoggerLogic:
    """Writes entries, as one transaction where possible. Not thread-safe: one writer."""

    def __init__(self, log: PredictionLog):
        self._log = log

    def commit(self, entries: Sequence[LogEntry]) -> list[Ack | Exception]:
        """Commits all entries; per entry what its caller may answer, or why the store refuses this one: a
        PatientErasedError where its patient was erased after it was received.

        Raises:
            StoreUnavailableError: nothing was committed for sure; the same entries may be sent again.
        """
        try:
            late = self._write(entries)
        except StoreUnavailableError:
            raise
        except Exception as error:
            if len(entries) == 1:
                return [error]
            # One entry that the store refuses must not take its neighbours along.
            return [result for entry in entries for result in self.commit([entry])]
        return [
            PatientErasedError("the patient was erased after this was received") if any_late else self._ack(entry)
            for entry, any_late in zip(entries, late, strict=True)
        ]

    def _write(self, entries: Sequence[LogEntry]) -> list[bool]:
        """Which entries have late records."""
        images = {name: data for entry in entries for name, data in entry.images.items()}
        records = [record for entry in entries for record in entry.records]
        on_disk: frozenset[str] = frozenset().union(*(entry.on_disk for entry in entries))
        late = self._log.write(records, images, on_disk).late
        places = itertools.count()
        return [any([next(places) in late for _ in entry.records]) for entry in entries]

    def _ack(self, entry: LogEntry) -> Ack:
        if all(record.idempotency_key is None for record in entry.records):
            return None
        return tuple(
            (record.idempotency_key and self._log.find_by_idempotency_key(record.caller, record.idempotency_key))
            or record
            for record in entry.records
        )

    def find(self, caller: str, keys: Sequence[str]) -> list[PredictionRecord | None]:
        """The caller's stored records under these idempotency keys."""
        return [self._log.find_by_idempotency_key(caller, key) for key in keys]

    def ping(self) -> bool:
        """True when the database answers; StoreUnavailableError otherwise."""
        with self._log.store.reading():
            return True


class DriftLogger:
    """Deployment around `DriftLoggerLogic`: one replica, whose calls share commits."""

    def __init__(
        self,
        storage: dict[str, Any],
        settings: dict[str, Any] | None = None,
        metrics: Recorder | None = None,
        alarms: dict[str, Any] | None = None,
    ):
        self._log = open_log(StorageSettings.model_validate(storage))
        self._logic = DriftLoggerLogic(self._log)
        self._metrics = metrics or replica_metrics()
        self._sampler = Sampler(self._metrics)
        # There is one replica of this deployment: each figure of the store is exported once.
        self._sampler.add(self._count_submissions, blocking=True)
        self._sampler.add(StoreGauges(self._log, self._metrics).read, blocking=True)
        # For the same reason, the images are swept and the alarms sent here.
        self._sweeper = ImageSweeper(self._log, DriftLoggerSettings.model_validate(settings or {}))
        self._alarm_sender = AlarmSender(self._log, ServiceAlarmSettings.model_validate(alarms or {}))
        show_ids_in_log()
        listen_on_node_address()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commits = SharedCalls(self._commit, size=lambda entry: entry.num_bytes)

    def __del__(self) -> None:
        # Serve calls it before it ends a replica, also one whose constructor failed.
        for name in ("_sweeper", "_alarm_sender"):
            if hasattr(self, name):
                getattr(self, name).stop()

    def _start_background(self) -> None:
        self._sampler.start()
        self._sweeper.start()
        self._alarm_sender.start()

    def _count_submissions(self) -> None:
        for state, number in count_pending(self._log.store).items():
            self._metrics.record(SUBMISSIONS_PENDING, number, state)

    async def _commit(self, entries: list[LogEntry]) -> list[Ack | Exception]:
        start, outcome = time.perf_counter(), "error"
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._logic.commit, entries)
            outcome = "ok"
        finally:
            self._metrics.record(LOG_COMMIT_SECONDS, time.perf_counter() - start, outcome)
        self._metrics.record(LOG_COMMIT_ROWS, sum(len(entry.records) for entry in entries))
        return results

    async def write(self, entries: list[LogEntry], request_ids: tuple[str, ...] = ()) -> list[Ack | Exception]:
        """Commits the entries; see `DriftLoggerLogic.commit`."""
        self._start_background()
        with watched_call("log", len(entries), request_ids):
            results = await asyncio.gather(*map(self._commits.submit, entries), return_exceptions=True)
            for result in results:
                if isinstance(result, StoreUnavailableError):
                    raise result
                if isinstance(result, Exception):
                    logger.error("the store refused an entry: %s", result)
            return [_plain(result) for result in results]

    async def find(
        self, caller: str, keys: list[str], request_ids: tuple[str, ...] = ()
    ) -> list[PredictionRecord | None]:
        """See `DriftLoggerLogic.find`."""
        with watched_call("lookup", len(keys), request_ids):
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._logic.find, caller, keys)

    async def ping(self) -> bool:
        """See `DriftLoggerLogic.ping`."""
        self._start_background()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._logic.ping)


def _plain(result: Any) -> Any:
    """Errors of drivers may not survive pickling; their text does."""
    if isinstance(result, PatientErasedError) or not isinstance(result, BaseException):
        return result
    return RuntimeError(str(result))
