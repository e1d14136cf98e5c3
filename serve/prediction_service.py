"""The way of a request: look up its key, score, log, answer. Without Ray; the nodes come as protocols."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from monitoring.prediction_log import PredictionRecord, patient_hmac
from serve.drift_logger import LogEntry
from serve.durable_log import DurableLog, LogUnavailableError
from serve.errors import ApiError, patient_erased, unavailable
from serve.explanation import Explanation, View
from serve.idempotency import check_comparison, conflict, logged_metadata, other_lesions
from serve.lesion import LesionRequest, Origin, keyed_id
from serve.lesion_scoring import Fusion, LesionScoring, ModelsDifferError, ScoredLesion, Scorer
from serve.metrics import ABSTENTIONS, PREDICTIONS, STAGE_SECONDS, NoMetrics, Recorder
from serve.model_columns import model_columns
from serve.request_ids import SLOW_CALL_S
from serve.served_model import ServedModel
from serve.settings import IngressSettings
from serve.shadow_scoring import ShadowScoring
from serve.stage_clock import StageClock
from serve.staged_images import StagedImages
from store.erased_patients import PatientErasedError
from store.image_files import StoredImage

logger = logging.getLogger("ray.serve")

# While a new model is rolled out, the nodes hold different ones for a moment. A replica that is itself being replaced
# never gets the new one: its requests end in time for their clients to come back to its successor.
_ROLLOUT_POLL_S = 0.1
_ROLLOUT_TIMEOUT_S = 5.0

Answer = TypeVar("Answer")
Outcome = tuple[PredictionRecord, dict[str, float]] | ApiError
"""A lesion's stored record and its stage timings (ms), or why it has none."""


class PredictionService:
    """Answers requests of one ingress replica.

    Args:
        scoring: the way through the other nodes.
        log: returns once records are on disk.
        patient_key: secret behind patient pseudonyms.
        metrics: what is told of every answer.
    """

    def __init__(self, scoring: LesionScoring, log: DurableLog, patient_key: bytes, metrics: Recorder | None = None):
        self.scoring = scoring
        self.limits = scoring.limits
        self._log = log
        self._patient_key = patient_key
        self._metrics = metrics or NoMetrics()
        self._model: ServedModel | None = None
        self._running = 0
        self.shadow: ShadowScoring | None = None

    @property
    def settings(self) -> IngressSettings:
        return self.scoring.settings

    @property
    def model(self) -> ServedModel:
        assert self._model is not None, "use_model comes before the first request"
        return self._model

    def oldest_wait_s(self) -> float:
        """For how long the picture that is next has waited for the network, seconds."""
        return self.scoring.scorer.oldest_wait_s()

    def use_model(self, model: ServedModel) -> None:
        """Serves this model from now on."""
        self._model = model

    def use_shadow(self, shadow: ShadowScoring | None) -> None:
        """Has this shadow score a copy of what is answered from now on; None: no shadow."""
        if self.shadow is not None:
            self.shadow.stop()
        self.shadow = shadow

    def unavailable(self, detail: str) -> ApiError:
        return unavailable(detail, self.settings.retry_after_s)

    def pseudonym(self, origin: Origin) -> str | None:
        """The patient's HMAC; None where no patient was named."""
        return origin.patient_hmac if origin.patient_id is None else patient_hmac(origin.patient_id, self._patient_key)

    async def check_image(self, data: bytes) -> StoredImage:
        """What would be kept of an uploaded file that can be scored.

        Raises:
            ApiError: as `prepare`.
        """
        (image,) = await self.scoring.prepare([LesionRequest(data)], self.model)
        if isinstance(image, ApiError):
            raise image
        return image.stored

    async def predict(
        self, requests: Sequence[LesionRequest | ApiError], route: str, patient: bool = False
    ) -> list[Outcome]:
        """Answers lesions in order; an item that is an error already, or turns out to be one, stays one.

        Args:
            route: where they came from, for the metrics.
            patient: all are one patient's, and each is compared with the others.

        Raises:
            ApiError: 503 when a node does not answer in time, or the records are on no disk; 409 when the model
                compares no lesions of a patient; 410 when the patient was erased after this came in; 422 when the key
                of a patient's lesions was used with others.
        """
        # Of several requests that are under way the pictures share a commit's syncs of folders, and the cores are busy.
        staged = self._log.stage() if len(requests) > 1 or self._running == 0 else None
        self._running += 1
        try:
            return await self._until_rolled_out(
                lambda model, deadline: self._attempt(requests, model, deadline, route, patient, staged)
            )
        except BaseException:
            if staged is not None:
                staged.abandon()
            raise
        finally:
            self._running -= 1

    async def _until_rolled_out(self, attempt: Callable[[ServedModel, float], Awaitable[Answer]]) -> Answer:
        """Makes an attempt with the model of the moment, again while the nodes hold different ones, until its time,
        `time.monotonic()`, is over."""
        deadline = time.monotonic() + self.settings.request_timeout_s
        give_up: float | None = None
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                while True:
                    try:
                        return await attempt(self.model, deadline)
                    except ModelsDifferError as error:
                        # From the first disagreement on: a large request may have taken long until then.
                        give_up = give_up or time.monotonic() + _ROLLOUT_TIMEOUT_S
                        if time.monotonic() > give_up:
                            raise self.unavailable("a new model is being rolled out") from error
                        await asyncio.sleep(_ROLLOUT_POLL_S)
        except TimeoutError as error:
            raise self.unavailable(f"no answer within {self.settings.request_timeout_s:g} s") from error

    async def _attempt(
        self,
        requests: Sequence[LesionRequest | ApiError],
        model: ServedModel,
        deadline: float,
        route: str,
        patient: bool,
        staged: StagedImages | None,
    ) -> list[Outcome]:
        clock = StageClock()
        outcomes: dict[int, Outcome] = {i: item for i, item in enumerate(requests) if isinstance(item, ApiError)}
        todo = {i: item for i, item in enumerate(requests) if isinstance(item, LesionRequest)}
        known = await self._find_known(todo, clock)
        if known:
            check_comparison(known.values(), patient)
            # A patient's lesions are stored together: what is missing beside them was refused before, or is new.
            looked_at = list(todo) if patient else list(known)
            # A known one's picture is looked at all the same: the key may have come with another one.
            prepared = await self.scoring.prepare([todo[index] for index in looked_at], model)
            for index, image in zip(looked_at, prepared, strict=True):
                request, record = todo.pop(index), known.get(index)
                if isinstance(image, ApiError):
                    outcomes[index] = image
                elif record is not None:
                    outcomes[index] = self._same_or_conflict(
                        request, image.stored.hash, record, record.stage_ms, patient
                    )
                else:
                    raise other_lesions()
        decoded = None if staged is None else staged.add
        scored, errors = await self.scoring.score(todo, model, deadline, clock, patient, decoded) if todo else ([], {})
        outcomes |= errors
        if scored:
            records = [self._record(todo[lesion.index], lesion, model, clock) for lesion in scored]
            images = {lesion.image.stored.hash: lesion.image.stored.data for lesion in scored}
            entry = LogEntry(tuple(records), images, frozenset() if staged is None else await staged.on_disk())
            stored = await self._write(entry)
            clock.end("log")
            stages = clock.stages()
            check_comparison(stored, patient)
            self._count(stored, stages, route)
            for lesion, record in zip(scored, stored, strict=True):
                request, image = todo[lesion.index], lesion.image
                outcomes[lesion.index] = self._same_or_conflict(request, image.stored.hash, record, stages, patient)
            if self.shadow is not None:
                self._offer_to(self.shadow, scored, outcomes, patient)
        return [outcomes[index] for index in range(len(requests))]

    @staticmethod
    def _offer_to(
        shadow: ShadowScoring, scored: Sequence[ScoredLesion], outcomes: Mapping[int, Outcome], patient: bool
    ) -> None:
        answered = []
        for lesion in scored:
            outcome = outcomes[lesion.index]
            if not isinstance(outcome, ApiError):
                answered.append((outcome[0], lesion))
        if answered:
            shadow.offer(answered, patient)

    def _count(self, records: Sequence[PredictionRecord], stages: Mapping[str, float], route: str) -> None:
        for stage, milliseconds in stages.items():
            self._metrics.record(STAGE_SECONDS, milliseconds / 1e3, route, stage)
        for record in records:
            self._metrics.record(PREDICTIONS, 1, route, record.band or "abstained", record.model_version)
            for reason in record.reasons:
                self._metrics.record(ABSTENTIONS, 1, reason, record.model_version)
        if stages["total"] > SLOW_CALL_S * 1e3:
            logger.warning("slow: %s with %d lesions took %s ms", route, len(records), stages)

    async def _find_known(
        self, requests: Mapping[int, LesionRequest], clock: StageClock
    ) -> dict[int, PredictionRecord]:
        """What is stored already under the requests' idempotency keys."""
        keys = {index: request.idempotency_key for index, request in requests.items() if request.idempotency_key}
        if not keys:
            return {}
        # The requests of one call are one caller's.
        found = await self._log.find(requests[next(iter(keys))].caller, list(keys.values()))
        clock.end("lookup")
        return {index: record for index, record in zip(keys, found, strict=True) if record is not None}

    async def _write(self, entry: LogEntry) -> Sequence[PredictionRecord]:
        try:
            return await self._log.write(entry) or entry.records
        except LogUnavailableError as error:
            raise self.unavailable(str(error)) from error
        except PatientErasedError as error:
            raise patient_erased() from error

    def _same_or_conflict(
        self,
        request: LesionRequest,
        image_hash: str,
        stored: PredictionRecord,
        stage_ms: Mapping[str, float],
        patient: bool,
    ) -> Outcome:
        """The stored record, unless the same key came with something else before."""
        return conflict(request, image_hash, self.pseudonym(request.origin), patient, stored) or (
            stored,
            dict(stage_ms),
        )

    def _record(
        self, request: LesionRequest, lesion: ScoredLesion, model: ServedModel, clock: StageClock
    ) -> PredictionRecord:
        origin, key = request.origin, request.idempotency_key
        return PredictionRecord(
            id=uuid.uuid4().hex if key is None else keyed_id(request.caller, key),
            idempotency_key=key,
            received_at=request.received_at,
            acquired_at=origin.acquired_at,
            caller=request.caller,
            patient_hmac=self.pseudonym(origin),
            institution=origin.institution,
            device=origin.device,
            image_hash=lesion.image.stored.hash,
            metadata=logged_metadata(request),
            **model_columns(lesion, model, clock),
        )

    async def explain(self, data: bytes, view: View, target_class: str | None, stored: bool = False) -> Explanation:
        """Draws where the network sees a class in an uploaded file; None: the likeliest malignant one.

        Args:
            stored: the file comes from the image store, where it may be larger than an upload may be.

        Raises:
            ApiError: 413, 415 or 422 for the file or the class; 503 when the scorer does not answer in time.
        """
        return await self._until_rolled_out(
            lambda model, deadline: self.scoring.explain(data, view, target_class, model, stored)
        )

    async def readiness(self) -> dict[str, str]:
        """State of every node: "ok", for the log also "spooling", or what is wrong with it."""
        names = ("image_scorer", "metadata_fusion", "log")
        timeout = self.settings.request_timeout_s / 3
        nodes = (self.scoring.scorer, self.scoring.fusion)
        results = await asyncio.gather(
            *(asyncio.wait_for(self._holds(node), timeout) for node in nodes),
            self._log.check(),
            return_exceptions=True,
        )
        states = {}
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Exception):
                logger.warning("%s is not ready: %r", name, result)
            states[name] = "no answer" if isinstance(result, BaseException) else result
        return states

    async def _holds(self, node: Scorer | Fusion) -> str:
        return "ok" if (await node.describe())["digest"] == self.model.digest else "another model"

    async def model_card(self) -> dict[str, Any]:
        """What /v1/model says: the model, its classes and fields, thresholds and metrics, engine and limits."""
        model = self.model
        scorer, fusion = await asyncio.gather(self.scoring.scorer.describe(), self.scoring.fusion.describe())
        return {
            "model_version": model.reference.version,
            "digest": model.digest,
            **model.card,
            "task": model.task.name,
            "synthetic": model.task.synthetic,
            "classes": model.task.classes,
            "malignant": model.task.malignant,
            "metadata_fields": {
                name: spec.model_dump(mode="json", exclude_none=True) for name, spec in model.task.columns.items()
            },
            "contexts": fusion["contexts"],
            "engine": scorer["engine"],
            "engine_fallback": scorer.get("engine_fallback"),
            "abstention": None
            if model.abstention is None
            else {"active": self.settings.abstain, **model.abstention.describe()},
            "limits": self.limits.model_dump(),
            "shadow": None if self.shadow is None else self.shadow.describe(),
            "notice": model.notice,
        }
