"""Scores queued submissions in the background of an ingress replica, through the same service as live requests.

A record of a submission goes to the prediction log under a key of the submission's own: an attempt that died between
scoring and saying so is found there by the next, and leaves no second record.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging

from monitoring.prediction_log import PredictionLog
from serve.api import Prediction, Problem
from serve.errors import ApiError
from serve.lesion import LesionRequest, Origin, keyed_id, parse_metadata
from serve.prediction_service import PredictionService
from serve.request_ids import working_for
from serve.settings import SubmissionSettings
from serve.store_calls import StoreCalls
from store.database import Store
from store.erasure import PatientErasure
from store.submissions import Claim, claim_submissions, find_submission, finish_submission, requeue_submission
from store.tables import now_us

logger = logging.getLogger("ray.serve")

_MAX_BACKOFF_S = 3600.0
# An attempt is given up this share of its lease before the lease ends, so that no other worker scores beside it.
_LEASE_MARGIN = 0.1
_STOP_GRACE_S = 5.0
_ACTOR = "submission worker"
_ORIGIN_FIELDS = ("patient_hmac", "institution", "device", "acquired_at")
_EXHAUSTED = ApiError(500, "attempts_exhausted", "the service ended during each attempt to score this submission")
# The cause may quote a patient's data; the log has it.
_INTERNAL = ApiError(500, "internal_error", "the service failed on this submission; its log says why")


def prediction_key(submission_id: str) -> str:
    """The idempotency key of a submission's record; the blank keeps it apart from every key that a caller can send."""
    return f"submission {submission_id}"


class SubmissionWorker:
    """Claims due submissions, several at a time so that they share the scorer's batches, and settles them.

    Lives on the event loop that calls `start`; the database and the image files are used in threads.
    """

    def __init__(self, service: PredictionService, log: PredictionLog, settings: SubmissionSettings):
        self._service = service
        self._log = log
        self._call = StoreCalls(log, service.settings.retry_after_s, "submission-worker", threads=2)
        self._settings = settings
        self._wake = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._scoring: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins, once; the service must have a model."""
        if self._task is None and not self._stopping:
            # An empty context: in a request's, Serve would cancel all later work with that one request.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())
            self._task.add_done_callback(self._on_end)

    def wake(self) -> None:
        """There is a new submission: look now, not at the next poll."""
        self._wake.set()

    async def stop(self) -> None:
        """Claims no more, and returns when what was claimed is settled; what takes longer than 5 s is left to the end
        of its lease."""
        self._stopping = True
        self._wake.set()
        for tasks in ([] if self._task is None else [self._task], self._scoring):
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=_STOP_GRACE_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            logger.error("the submission worker ended unexpectedly", exc_info=task.exception())
            if not task.get_loop().is_closed():
                self.start()

    async def _run(self) -> None:
        while not self._stopping:
            # Cleared before the look: what arrives during it is seen by the next.
            self._wake.clear()
            try:
                await self._claim()
            except Exception as error:
                logger.error("the submission queue cannot be read: %r", error)
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`, which before Python 3.12 loses a cancellation that comes together with the wake-up.
                async with asyncio.timeout(self._settings.poll_interval_s):
                    await self._wake.wait()

    async def _claim(self) -> None:
        """Fills the free places with due submissions."""
        free = self._settings.concurrency - len(self._scoring)
        if free == 0 or self._stopping:
            return
        exhausted = Problem.of(_EXHAUSTED).model_dump_json()
        lease_us = int(self._settings.lease_s * 1e6)
        claims = await self._call(claim_submissions, free, lease_us, self._settings.attempts, exhausted)
        for claim in claims:
            task = asyncio.create_task(self._work(claim))
            self._scoring.add(task)
            task.add_done_callback(self._on_scored)

    def _on_scored(self, task: asyncio.Task[None]) -> None:
        self._scoring.discard(task)
        # Its place is free; the queue may hold more.
        self._wake.set()

    async def _work(self, claim: Claim) -> None:
        # The request that submitted it was answered long ago.
        with working_for((f"submission:{claim.id}",)):
            try:
                outcome = await self._score(claim)
                await self._call(self._settle_or_erase, claim, outcome)
            except Exception as error:
                logger.error("submission %s waits for the end of its lease: %r", claim.id, error)

    async def _score(self, claim: Claim) -> Prediction | ApiError:
        left_s = (claim.leased_until - now_us()) / 1e6 - _LEASE_MARGIN * self._settings.lease_s
        try:
            async with asyncio.timeout(left_s):
                request = claim.request
                image = await self._call(self._picture, request["image_hash"], request["image_suffix"])
                # Again: the model of now may want other fields than that of the time of the submission.
                metadata = parse_metadata(request["metadata"], self._service.model.task)
                origin = Origin(**{name: request[name] for name in _ORIGIN_FIELDS})
                key = prediction_key(claim.id)
                # At that time its patient was not erased; from then on, the log keeps out what an erasure overtakes.
                claimed = claim.claimed_at
                lesion = LesionRequest(image, metadata, origin, key, claim.caller, stored=True, received_at=claimed)
                (outcome,) = await self._service.predict([lesion], "/v1/submissions")
        except ApiError as error:
            return error
        except TimeoutError:
            return self._service.unavailable("no answer before the end of the lease")
        except Exception:
            logger.exception("submission %s, attempt %d", claim.id, claim.attempts)
            return _INTERNAL
        return outcome if isinstance(outcome, ApiError) else Prediction.of(*outcome)

    def _picture(self, _store: Store, name: str, suffix: str) -> bytes:
        return self._log.image_files.get(name, suffix)

    def _settle_or_erase(self, store: Store, claim: Claim, outcome: Prediction | ApiError) -> None:
        if self._settle(store, claim, outcome):
            return
        if find_submission(store, claim.id) is not None:
            logger.error("submission %s went to another worker during its attempt", claim.id)
            return
        # The log keeps the record out by its time, where the clocks of the machines agree.
        erasure = PatientErasure(store, self._log.image_files, self._log.spool)
        prediction_id = keyed_id(claim.caller, prediction_key(claim.id))
        patient = claim.request["patient_hmac"]
        removed = patient is not None and erasure.erase_prediction(prediction_id, patient, _ACTOR)
        logger.error(
            "submission %s was erased during its attempt%s", claim.id, "; so is its prediction" if removed else ""
        )

    def _settle(self, store: Store, claim: Claim, outcome: Prediction | ApiError) -> bool:
        """Done, failed for good, or back to the queue; False when it is no longer this worker's to say."""
        if isinstance(outcome, Prediction):
            return finish_submission(store, claim, json.loads(outcome.model_dump_json()))
        error = Problem.of(outcome).model_dump_json()
        # A 4xx stays one, however often it is tried.
        if outcome.status < 500 or claim.attempts >= self._settings.attempts:
            return finish_submission(store, claim, None, error)
        wait_s = min(_MAX_BACKOFF_S, self._settings.backoff_s * 2 ** (claim.attempts - 1))
        return requeue_submission(store, claim, now_us() + int(wait_s * 1e6), error)
