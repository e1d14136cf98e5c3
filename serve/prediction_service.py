"""The way of a request: look up its key, decode, score, fuse, log, answer. Without Ray; the nodes come as protocols."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from monitoring.prediction_log import PredictionRecord, encode_embedding, patient_hmac
from serve.drift_logger import LogEntry
from serve.durable_log import DurableLog, LogUnavailableError
from serve.errors import ApiError, invalid_field, unavailable
from serve.image_scorer import ImageScores
from serve.lesion import LesionRequest, PreparedImage, keyed_id, prepare_or_error
from serve.metadata_fusion import FusedRisk, FusedRisks
from serve.served_model import ServedModel
from serve.settings import IngressSettings, UploadLimits
from serve.stage_clock import StageClock

logger = logging.getLogger("ray.serve")

# While a new model is rolled out, the nodes hold different ones for a moment. A replica that is itself being replaced
# never gets the new one: its requests end in time for their clients to come back to its successor.
_ROLLOUT_POLL_S = 0.1
_ROLLOUT_TIMEOUT_S = 5.0
# Pictures of one request that are scored together: enough for the network's best rate, few enough to overlap.
_PART_IMAGES = 16
_PARTS_UNDER_WAY = 3
# A tile of 10 KB is decoded in less time than a thread takes to get going beside the event loop.
_SMALL_BYTES = 32 * 2**10

Outcome = tuple[PredictionRecord, dict[str, float]] | ApiError
"""A lesion's stored record and its stage timings (ms), or why it has none."""


class Scorer(Protocol):
    async def score(self, images: np.ndarray, deadline: float) -> ImageScores | None: ...

    def oldest_wait_s(self) -> float: ...

    async def describe(self) -> dict[str, Any]: ...


class Fusion(Protocol):
    async def fuse(self, log_probabilities: np.ndarray, records: list) -> FusedRisks: ...

    async def describe(self) -> dict[str, Any]: ...


Result = TypeVar("Result")


async def gather_or_cancel(work: Sequence[Awaitable[Result]]) -> list[Result]:
    """As `asyncio.gather`, but what is still under way when one fails, or the caller is cancelled, is cancelled too."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _ModelsDifferError(Exception):
    """The nodes answered with different bundles: a new one is being rolled out."""


@dataclass(frozen=True)
class _Scored:
    """One lesion of a request on its way to the log; `index` is its place in the request, `scores` its own row."""

    index: int
    image: PreparedImage
    scores: ImageScores
    risk: FusedRisk


class PredictionService:
    """Answers requests of one ingress replica.

    Args:
        scorer, fusion: the other nodes.
        log: returns once records are on disk.
        patient_key: secret behind patient pseudonyms.
        max_batch_size: pictures that one call of the scorer takes.
    """

    def __init__(
        self,
        scorer: Scorer,
        fusion: Fusion,
        log: DurableLog,
        limits: UploadLimits,
        settings: IngressSettings,
        patient_key: bytes,
        max_batch_size: int = _PART_IMAGES,
    ):
        self.limits = limits
        self.settings = settings
        self._scorer = scorer
        self._fusion = fusion
        self._log = log
        self._patient_key = patient_key
        self._part_images = min(_PART_IMAGES, max_batch_size)
        self._model: ServedModel | None = None
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")

    @property
    def model(self) -> ServedModel:
        assert self._model is not None, "use_model comes before the first request"
        return self._model

    def oldest_wait_s(self) -> float:
        """For how long the picture that is next has waited for the network, seconds."""
        return self._scorer.oldest_wait_s()

    def use_model(self, model: ServedModel) -> None:
        """Serves this model from now on."""
        self._model = model

    def unavailable(self, detail: str) -> ApiError:
        return unavailable(detail, self.settings.retry_after_s)

    async def predict(self, requests: Sequence[LesionRequest | ApiError]) -> list[Outcome]:
        """Answers lesions in order; an item that is an error already, or turns out to be one, stays one.

        Raises:
            ApiError: 503 when a node does not answer in time, or the records are on no disk.
        """
        deadline = time.monotonic() + self.settings.request_timeout_s
        give_up = time.monotonic() + _ROLLOUT_TIMEOUT_S
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                while True:
                    try:
                        return await self._attempt(requests, self.model, deadline)
                    except _ModelsDifferError as error:
                        if time.monotonic() > give_up:
                            raise self.unavailable("a new model is being rolled out") from error
                        await asyncio.sleep(_ROLLOUT_POLL_S)
        except TimeoutError as error:
            raise self.unavailable(f"no answer within {self.settings.request_timeout_s:g} s") from error

    async def _attempt(
        self, requests: Sequence[LesionRequest | ApiError], model: ServedModel, deadline: float
    ) -> list[Outcome]:
        clock = StageClock()
        outcomes: dict[int, Outcome] = {i: item for i, item in enumerate(requests) if isinstance(item, ApiError)}
        todo = {i: item for i, item in enumerate(requests) if isinstance(item, LesionRequest)}
        known = await self._find_known(todo, clock)
        # Parts, so that the network already runs while the next pictures are decoded.
        size, order = self._part_images, list(todo)
        parts = [{i: todo[i] for i in order[start : start + size]} for start in range(0, len(order), size)]
        # One large request must not fill the queue in front of all others: its parts come as the first ones leave.
        room = asyncio.Semaphore(_PARTS_UNDER_WAY)

        async def score(part: dict[int, LesionRequest]) -> list[_Scored]:
            async with room:
                return await self._score_part(part, known, outcomes, model, deadline, clock)

        scored = [answer for answers in await gather_or_cancel([score(part) for part in parts]) for answer in answers]
        if scored:
            records = [self._record(todo[lesion.index], lesion, model, clock) for lesion in scored]
            entry = LogEntry(tuple(records), {lesion.image.stored.hash: lesion.image.stored.data for lesion in scored})
            stored = await self._write(entry)
            clock.end("log")
            for lesion, record in zip(scored, stored, strict=True):
                outcomes[lesion.index] = self._same_or_conflict(todo[lesion.index], lesion.image, record, clock)
        return [outcomes[index] for index in range(len(requests))]

    async def _find_known(
        self, requests: Mapping[int, LesionRequest], clock: StageClock
    ) -> dict[int, PredictionRecord | None]:
        """What is stored already under the requests' idempotency keys."""
        keys = {index: request.idempotency_key for index, request in requests.items() if request.idempotency_key}
        if not keys:
            return {}
        # The requests of one call are one caller's.
        found = await self._log.find(requests[next(iter(keys))].caller, list(keys.values()))
        clock.end("lookup")
        return dict(zip(keys, found, strict=True))

    async def _score_part(
        self,
        part: Mapping[int, LesionRequest],
        known: Mapping[int, PredictionRecord | None],
        outcomes: dict[int, Outcome],
        model: ServedModel,
        deadline: float,
        clock: StageClock,
    ) -> list[_Scored]:
        """Decodes, scores and fuses some of a request's lesions; those with an outcome already get it at once."""
        images: dict[int, PreparedImage] = {}
        for index, result in zip(part, await self._prepare(list(part.values()), model), strict=True):
            if isinstance(result, ApiError):
                outcomes[index] = result
            elif (record := known.get(index)) is not None:
                outcomes[index] = self._same_or_conflict(part[index], result, record, None)
            else:
                images[index] = result
        clock.end("decode")
        if not images:
            return []
        scores = await self._scorer.score(np.stack([image.pixels for image in images.values()]), deadline)
        clock.end("score")
        if scores is None or scores.digest != model.digest:
            raise _ModelsDifferError
        fused = await self._fusion.fuse(scores.log_probabilities, [part[index].metadata for index in images])
        clock.end("fuse")
        if fused.digest != model.digest:
            raise _ModelsDifferError
        return [
            _Scored(index, image, scores[row : row + 1], fused.risks[row])
            for row, (index, image) in enumerate(images.items())
        ]

    async def _prepare(
        self, requests: Sequence[LesionRequest], model: ServedModel
    ) -> Sequence[PreparedImage | ApiError]:
        if len(requests) == 1 and len(requests[0].image) <= _SMALL_BYTES:
            return [prepare_or_error(requests[0].image, model.input_size, self.limits)]
        decode = asyncio.get_running_loop().run_in_executor
        arguments = (model.input_size, self.limits)
        return await gather_or_cancel(
            [decode(self._threads, prepare_or_error, request.image, *arguments) for request in requests]
        )

    def _same_or_conflict(
        self, request: LesionRequest, image: PreparedImage, stored: PredictionRecord, clock: StageClock | None
    ) -> Outcome:
        """The stored record, unless the same key came with something else before."""
        same = stored.image_hash == image.stored.hash and stored.metadata == _logged_metadata(request)
        if not same:
            return invalid_field("Idempotency-Key: this key was used with another image or metadata; send a new one")
        return stored, clock.stages() if clock is not None else dict(stored.stage_ms)

    async def _write(self, entry: LogEntry) -> Sequence[PredictionRecord]:
        try:
            return await self._log.write(entry) or entry.records
        except LogUnavailableError as error:
            raise self.unavailable(str(error)) from error

    def _record(
        self, request: LesionRequest, lesion: _Scored, model: ServedModel, clock: StageClock
    ) -> PredictionRecord:
        image, scores, risk = lesion.image, lesion.scores, lesion.risk
        origin, key = request.origin, request.idempotency_key
        reasons = self._reasons_to_abstain(image, model, scores)
        return PredictionRecord(
            id=uuid.uuid4().hex if key is None else keyed_id(request.caller, key),
            idempotency_key=key,
            received_at=clock.received_at,
            acquired_at=origin.acquired_at,
            caller=request.caller,
            patient_hmac=None if origin.patient_id is None else patient_hmac(origin.patient_id, self._patient_key),
            institution=origin.institution,
            device=origin.device,
            image_hash=image.stored.hash,
            model_version=model.reference.version,
            context=risk.context,
            metadata=_logged_metadata(request),
            image_score=float(np.exp(scores.log_probabilities[0])[model.task.malignant_mask].sum()),
            class_probabilities=risk.class_probabilities,
            risk=None if reasons else risk.risk,
            band=None if reasons else risk.band,
            threshold=risk.threshold,
            abstained=bool(reasons),
            reasons=reasons,
            embedding=encode_embedding(scores.projections[0]),
            stage_ms=clock.stages(),
            **image.quality,
        )

    def _reasons_to_abstain(self, image: PreparedImage, model: ServedModel, scores: ImageScores) -> list[str]:
        """Codes of `modeling.abstention` for one picture; none where the model, or the operator, wants all scored."""
        if model.abstention is None or not self.settings.abstain:
            return []
        assert scores.distances is not None, "the same bundle gave the scores"
        (found,) = model.abstention.refusals(image.quality, scores.distances)
        if found:
            logger.info(
                "abstained from %s: %s", image.stored.hash[:12], "; ".join(f"{r.reason}: {r.detail}" for r in found)
            )
        return [refusal.reason for refusal in found]

    async def readiness(self) -> dict[str, str]:
        """State of every node: "ok", for the log also "spooling", or what is wrong with it."""
        names = ("image_scorer", "metadata_fusion", "log")
        timeout = self.settings.request_timeout_s / 3
        results = await asyncio.gather(
            *(asyncio.wait_for(check, timeout) for check in (self._holds(self._scorer), self._holds(self._fusion))),
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
        scorer, fusion = await asyncio.gather(self._scorer.describe(), self._fusion.describe())
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
            "notice": model.notice,
        }


def _logged_metadata(request: LesionRequest) -> dict[str, Any]:
    return {name: value for name, value in (request.metadata or {}).items() if value is not None}
