"""A challenger scores a copy of the traffic behind the champion's back: no answer waits for it or fails with it.

Copies wait in memory, within bounds; what does not fit, waits too long, or comes while the shadow recovers from a
failure is dropped and counted. Without Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import hashlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling.preprocessing import decode_image, image_quality, resize
from monitoring.prediction_log import PredictionRecord
from serve.drift_logger import LogEntry
from serve.durable_log import DurableLog
from serve.errors import ApiError
from serve.lesion import LesionRequest, PreparedImage
from serve.lesion_scoring import PART_IMAGES, LesionScoring, ScoredLesion
from serve.model_columns import model_columns
from serve.served_model import ServedModel
from serve.shadow_settings import ShadowReference
from serve.stage_clock import StageClock
from store.erased_patients import PatientErasedError
from store.shadow_records import shadow_id

logger = logging.getLogger("ray.serve")

# Copies start this long after the answer: it is out by then, and copies that came together share calls.
_LINGER_S = 0.02
_FIRST_PAUSE_S = 1.0
# A record beside its picture.
_RECORD_BYTES = 4096


@dataclass(frozen=True)
class LesionCopy(LesionRequest):
    """A lesion that the champion has answered.

    `image`: its stored bytes, where the shadow's input has another size, else empty. `picture`: as the champion saw it,
    without stored bytes.
    """

    record: PredictionRecord = field(kw_only=True)
    picture: PreparedImage = field(kw_only=True)

    @property
    def num_bytes(self) -> int:
        return len(self.image) + self.picture.pixels.nbytes + _RECORD_BYTES


@dataclass(frozen=True)
class _Copy:
    """Lesions to be scored together; `offered_at`: `time.monotonic()`."""

    lesions: Sequence[LesionCopy]
    patient: bool
    offered_at: float

    @property
    def num_bytes(self) -> int:
        return sum(lesion.num_bytes for lesion in self.lesions)


class CopyScoring(LesionScoring):
    """`LesionScoring` of `LesionCopy`s: a picture that has the network's size already is not decoded again."""

    async def prepare(
        self, requests: Sequence[LesionRequest], model: ServedModel
    ) -> Sequence[PreparedImage | ApiError]:
        decode = asyncio.get_running_loop().run_in_executor
        pictures = []
        for copy in requests:
            assert isinstance(copy, LesionCopy)
            again = copy.image and await decode(self._threads, _decode_again, copy, model.input_size)
            pictures.append(again or copy.picture)
        return pictures

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _decode_again(copy: LesionCopy, input_size: int) -> PreparedImage:
    # Stored bytes were checked when they were uploaded.
    image = decode_image(copy.image)
    pixels = resize(image, input_size)
    return PreparedImage(pixels, image_quality(image, pixels), copy.picture.stored)


def is_shadowed(prediction_id: str, fraction: float) -> bool:
    """Whether a prediction belongs to the fraction that is shadowed: the same on every replica and every retry."""
    place = int.from_bytes(hashlib.sha256(prediction_id.encode()).digest()[:7], "big")
    return place < fraction * 2**56


class ShadowScoring:
    """The shadow of one ingress replica. Its methods belong to the event loop.

    Args:
        reference: which model, and what it may cost.
        model: the same, loaded; its nodes are those of `scoring`.
        log: takes the records that lie beside the champion's.
    """

    def __init__(self, reference: ShadowReference, model: ServedModel, scoring: CopyScoring, log: DurableLog):
        self.reference = reference
        self._settings = reference.settings
        self._model = model
        self._scoring = scoring
        self._log = log
        self._queue: deque[_Copy] = deque()
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._paused_until = 0.0
        self._pause_s = 0.0
        self._stopped = False
        self.scored = self.dropped = self.failed = 0

    @property
    def waiting_bytes(self) -> int:
        """What the copies that wait or are being scored hold in memory."""
        return self._bytes

    def describe(self) -> dict[str, Any]:
        """Which model it is, and how many lesions it scored, never tried, and failed on, on this replica."""
        return {
            "model_version": self._model.reference.version,
            "digest": self._model.digest,
            "fraction": self._settings.fraction,
            "scored": self.scored,
            "dropped": self.dropped,
            "failed": self.failed,
        }

    def offer(self, answered: Sequence[tuple[PredictionRecord, ScoredLesion]], patient: bool) -> None:
        """Takes copies of lesions that the champion answered, or drops them; returns at once and never raises.

        Args:
            answered: the champion's stored records.
            patient: all are one patient's; they are shadowed all or none, as each is compared with the others.
        """
        try:
            if patient:
                parts = [answered] if is_shadowed(answered[0][0].id, self._settings.fraction) else []
            else:
                chosen = [item for item in answered if is_shadowed(item[0].id, self._settings.fraction)]
                parts = [chosen[start : start + PART_IMAGES] for start in range(0, len(chosen), PART_IMAGES)]
            for part in parts:
                self._take(part, patient)
        except Exception as error:
            self.failed += len(answered)
            logger.error("the shadow's copies could not be made: %r", error)

    def _take(self, part: Sequence[tuple[PredictionRecord, ScoredLesion]], patient: bool) -> None:
        now = time.monotonic()
        if self._stopped or now < self._paused_until:
            self.dropped += len(part)
            return
        copy = _Copy([self._copy_of(*item) for item in part], patient, now)
        if self._bytes + copy.num_bytes > self._settings.max_bytes:
            self.dropped += len(part)
            return
        self._bytes += copy.num_bytes
        self._queue.append(copy)
        if self._timer is None:
            # An empty context: in the request's, Serve would cancel later copies together with that one request.
            self._timer = asyncio.get_running_loop().call_later(
                _LINGER_S, self._on_timer, context=contextvars.Context()
            )

    def _copy_of(self, record: PredictionRecord, lesion: ScoredLesion) -> LesionCopy:
        picture, size = lesion.image, self._model.input_size
        fits = picture.pixels.shape[:2] == (size, size)
        return LesionCopy(
            image=b"" if fits else picture.stored.data,
            metadata=record.metadata,
            record=record,
            picture=dataclasses.replace(picture, stored=dataclasses.replace(picture.stored, data=b"")),
        )

    def _on_timer(self) -> None:
        self._timer = None
        self._start()

    def _start(self) -> None:
        while self._queue and len(self._tasks) < self._settings.concurrency:
            copy = self._queue.popleft()
            if time.monotonic() - copy.offered_at > self._settings.max_wait_s:
                self._drop(copy)
                continue
            task = asyncio.get_running_loop().create_task(self._run(copy), context=contextvars.Context())
            self._tasks.add(task)
            task.add_done_callback(self._on_end)

    def _drop(self, copy: _Copy) -> None:
        self._bytes -= copy.num_bytes
        self.dropped += len(copy.lesions)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("the task behind the shadow ended unexpectedly", exc_info=task.exception())
        if not task.get_loop().is_closed():
            self._start()

    async def _run(self, copy: _Copy) -> None:
        try:
            records = await self._score(copy)
            # The champion's record has the picture already.
            # Of a patient who was erased meanwhile the log keeps nothing, and the shadow is well.
            with contextlib.suppress(PatientErasedError):
                await self._log.write(LogEntry(tuple(records), {}))
        except ApiError as error:
            self.failed += len(copy.lesions)
            # Below 500 the model has no answer to this request (it compares no lesions of a patient), and is well.
            if error.status >= 500:
                self._pause(error)
        except Exception as error:
            self.failed += len(copy.lesions)
            self._pause(error)
        else:
            self.scored += len(records)
            self.failed += len(copy.lesions) - len(records)
            self._pause_s = 0.0
        finally:
            self._bytes -= copy.num_bytes

    async def _score(self, copy: _Copy) -> list[PredictionRecord]:
        clock, timeout_s = StageClock(), self._settings.timeout_s
        requests: dict[int, LesionRequest] = dict(enumerate(copy.lesions))
        async with asyncio.timeout(timeout_s):
            deadline = time.monotonic() + timeout_s
            scored, _ = await self._scoring.score(requests, self._model, deadline, clock, copy.patient)
        return [self._record(copy.lesions[lesion.index].record, lesion, clock) for lesion in scored]

    def _record(self, champion: PredictionRecord, lesion: ScoredLesion, clock: StageClock) -> PredictionRecord:
        own = {"id": shadow_id(champion.id), "role": "shadow", "idempotency_key": None}
        return PredictionRecord(**{**champion.to_row(), **model_columns(lesion, self._model, clock), **own})

    def _pause(self, error: Exception) -> None:
        """Drops what waits, and what comes in the next seconds: a second at first, twice as long each time."""
        now = time.monotonic()
        if now < self._paused_until:
            return
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), self._settings.max_pause_s)
        self._paused_until = now + self._pause_s
        while self._queue:
            self._drop(self._queue.popleft())
        version = self._model.reference.version
        logger.error("shadow %s failed, and scores nothing for %g s: %r", version, self._pause_s, error)

    def stop(self) -> None:
        """Drops all copies and takes no more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            self._drop(self._queue.popleft())
        for task in self._tasks:
            task.cancel()
        self._scoring.close()
