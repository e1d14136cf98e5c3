"""The way of a request: look up its key, decode, score, fuse, log, answer. Without Ray; the nodes come as protocols."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from monitoring.prediction_log import PredictionRecord, encode_embedding, patient_hmac
from serve.drift_logger import LogEntry
from serve.durable_log import DurableLog, LogUnavailableError
from serve.errors import ApiError, invalid_field, unavailable
from serve.image_scorer import ImageScores
from serve.lesion import LesionRequest, Origin, PreparedImage, keyed_id, prepare
from serve.metadata_fusion import FusedRisks
from serve.served_model import ServedModel
from serve.settings import IngressSettings, UploadLimits
from serve.stage_clock import StageClock
from store.image_files import StoredImage

logger = logging.getLogger("ray.serve")

# While a new model is rolled out, the nodes hold different ones for a moment. A replica that is itself being replaced
# never gets the new one: its requests end in time for their clients to come back to its successor.
_ROLLOUT_POLL_S = 0.1
_ROLLOUT_TIMEOUT_S = 5.0

Outcome = tuple[PredictionRecord, dict[str, float]] | ApiError
"""A lesion's stored record and its stage timings (ms), or why it has none."""


class Scorer(Protocol):
    async def score(self, images: np.ndarray) -> ImageScores | None: ...

    async def describe(self) -> dict[str, Any]: ...


class Fusion(Protocol):
    async def fuse(self, log_probabilities: np.ndarray, records: list) -> FusedRisks: ...

    async def describe(self) -> dict[str, Any]: ...


class _ModelsDifferError(Exception):
    """The nodes answered with different bundles: a new one is being rolled out."""


class PredictionService:
    """Answers requests of one ingress replica.

    Args:
        scorer, fusion: the other nodes.
        log: returns once records are on disk.
        patient_key: secret behind patient pseudonyms.
    """

    def __init__(
        self,
        scorer: Scorer,
        fusion: Fusion,
        log: DurableLog,
        limits: UploadLimits,
        settings: IngressSettings,
        patient_key: bytes,
    ):
        self.limits = limits
        self.settings = settings
        self._scorer = scorer
        self._fusion = fusion
        self._log = log
        self._patient_key = patient_key
        self._model: ServedModel | None = None
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")

    @property
    def model(self) -> ServedModel:
        assert self._model is not None, "use_model comes before the first request"
        return self._model

    def use_model(self, model: ServedModel) -> None:
        """Serves this model from now on."""
        self._model = model

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
        loop = asyncio.get_running_loop()
        return (await loop.run_in_executor(self._threads, prepare, data, self.model.input_size, self.limits)).stored

    async def predict(self, requests: Sequence[LesionRequest | ApiError]) -> list[Outcome]:
        """Answers lesions in order; an item that is an error already, or turns out to be one, stays one.

        Raises:
            ApiError: 503 when a node does not answer in time, or the records are on no disk.
        """
        give_up = time.monotonic() + _ROLLOUT_TIMEOUT_S
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                while True:
                    try:
                        return await self._attempt(requests, self.model)
                    except _ModelsDifferError as error:
                        if time.monotonic() > give_up:
                            raise self.unavailable("a new model is being rolled out") from error
                        await asyncio.sleep(_ROLLOUT_POLL_S)
        except TimeoutError as error:
            raise self.unavailable(f"no answer within {self.settings.request_timeout_s:g} s") from error

    async def _attempt(self, requests: Sequence[LesionRequest | ApiError], model: ServedModel) -> list[Outcome]:
        clock = StageClock()
        outcomes: dict[int, Outcome] = {}
        images = await self._prepare_all(requests, model, outcomes)
        clock.lap("decode")
        await self._answer_known(requests, images, outcomes)
        todo = [index for index in images if index not in outcomes]
        if todo:
            clock.restart_lap()
            pixels = np.stack([images[index].pixels for index in todo])
            scores = await self._scorer.score(pixels)
            clock.lap("score")
            if scores is None or scores.digest != model.digest:
                raise _ModelsDifferError
            metadata = [_request(requests[index]).metadata for index in todo]
            fused = await self._fusion.fuse(scores.log_probabilities, metadata)
            clock.lap("fuse")
            if fused.digest != model.digest:
                raise _ModelsDifferError
            records = [
                self._record(_request(requests[index]), images[index], model, scores[row : row + 1], fused, row, clock)
                for row, index in enumerate(todo)
            ]
            entry = LogEntry(tuple(records), {images[index].stored.hash: images[index].stored.data for index in todo})
            stored = await self._write(entry)
            clock.lap("log")
            for index, record in zip(todo, stored, strict=True):
                outcomes[index] = self._same_or_conflict(_request(requests[index]), images[index], record, clock)
        return [outcomes[index] for index in range(len(requests))]

    async def _prepare_all(
        self, requests: Sequence[LesionRequest | ApiError], model: ServedModel, outcomes: dict[int, Outcome]
    ) -> dict[int, PreparedImage]:
        loop = asyncio.get_running_loop()
        jobs = {}
        for index, request in enumerate(requests):
            if isinstance(request, ApiError):
                outcomes[index] = request
            else:
                limits = None if request.stored else self.limits
                jobs[index] = loop.run_in_executor(self._threads, prepare, request.image, model.input_size, limits)
        results = await asyncio.gather(*jobs.values(), return_exceptions=True)
        images = {}
        for index, result in zip(jobs, results, strict=True):
            if isinstance(result, ApiError):
                outcomes[index] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                images[index] = result
        return images

    async def _answer_known(
        self,
        requests: Sequence[LesionRequest | ApiError],
        images: Mapping[int, PreparedImage],
        outcomes: dict[int, Outcome],
    ) -> None:
        """Answers what is stored already under its idempotency key."""
        keys = {index: key for index in images if (key := _request(requests[index]).idempotency_key) is not None}
        if not keys:
            return
        # The requests of one call are one caller's.
        found = await self._log.find(_request(requests[next(iter(keys))]).caller, list(keys.values()))
        for index, record in zip(keys, found, strict=True):
            if record is not None:
                outcomes[index] = self._same_or_conflict(_request(requests[index]), images[index], record, None)

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
        self,
        request: LesionRequest,
        image: PreparedImage,
        model: ServedModel,
        scores: ImageScores,
        fused: FusedRisks,
        row: int,
        clock: StageClock,
    ) -> PredictionRecord:
        risk, origin, key = fused.risks[row], request.origin, request.idempotency_key
        reasons = self._reasons_to_abstain(image, model, scores)
        return PredictionRecord(
            id=uuid.uuid4().hex if key is None else keyed_id(request.caller, key),
            idempotency_key=key,
            received_at=clock.received_at,
            acquired_at=origin.acquired_at,
            caller=request.caller,
            patient_hmac=self.pseudonym(origin),
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


def _request(item: LesionRequest | ApiError) -> LesionRequest:
    assert isinstance(item, LesionRequest)
    return item


def _logged_metadata(request: LesionRequest) -> dict[str, Any]:
    return {name: value for name, value in (request.metadata or {}).items() if value is not None}
