"""From uploaded pictures to calibrated risks: decode, score, fuse, in parts that overlap. Without Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from modeling.image_limits import Refusal
from serve.errors import ApiError
from serve.explanation import (
    Explanation,
    View,
    draw,
    likeliest_malignant,
    open_picture,
    parse_class,
    weight_of_evidence,
)
from serve.image_scorer import ActivationMap, ImageScores
from serve.large_requests import LargeRequests
from serve.lesion import LesionRequest, PreparedImage, prepare_or_error
from serve.metadata_fusion import FusedRisk, FusedRisks
from serve.served_model import ServedModel
from serve.settings import IngressSettings, UploadLimits
from serve.stage_clock import StageClock
from serve.upload import read_dimensions, sniff_format
from store.image_files import StoredImage

logger = logging.getLogger("ray.serve")

# Pictures of one request that are scored together: enough for the network's best rate, few enough to overlap.
PART_IMAGES = 16
_FIRST_PART_IMAGES = 4
_PARTS_UNDER_WAY = 3
# A tile is decoded in less time than a thread takes to get going beside the event loop. Bytes alone say nothing: a PNG
# of 6 KB can hold 49 million pixels, which would keep the loop for two seconds.
_SMALL_BYTES, _SMALL_PIXELS = 32 * 2**10, 256 * 256

Result = TypeVar("Result")


class Scorer(Protocol):
    async def score(self, images: np.ndarray, deadline: float) -> ImageScores | None: ...

    def oldest_wait_s(self) -> float: ...

    async def explain(self, image: np.ndarray) -> ActivationMap | None: ...

    async def describe(self) -> dict[str, Any]: ...


class Fusion(Protocol):
    async def fuse(self, log_probabilities: np.ndarray, records: list) -> FusedRisks: ...

    async def fuse_patient(
        self, log_probabilities: np.ndarray, records: list, trusted: np.ndarray
    ) -> FusedRisks | None: ...

    async def describe(self) -> dict[str, Any]: ...


class ModelsDifferError(Exception):
    """The nodes answered with different bundles: a new one is being rolled out."""


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


@dataclass(frozen=True)
class ScoredLesion:
    """One lesion of a request on its way to the log.

    Attributes:
        index: its place in the request.
        image: the decoded picture.
        scores: its own row.
        reasons: why the model abstains; empty where it does not.
        risk: the fused answer, also of an abstained lesion, for review.
    """

    index: int
    image: PreparedImage
    scores: ImageScores
    reasons: list[str]
    risk: FusedRisk


@dataclass(frozen=True)
class _Part:
    """Some lesions of a request, scored: images by place in the request, and their rows of scores."""

    images: dict[int, PreparedImage]
    scores: ImageScores
    reasons: list[list[str]]


class LesionScoring:
    """Takes the lesions of one request through the image node and the fusion node.

    Args:
        max_batch_size: pictures that one call of the scorer takes.
    """

    def __init__(
        self, scorer: Scorer, fusion: Fusion, limits: UploadLimits, settings: IngressSettings, max_batch_size: int
    ):
        self.scorer = scorer
        self.fusion = fusion
        self.limits = limits
        self.settings = settings
        self._part_images = min(PART_IMAGES, max_batch_size)
        self._large = LargeRequests(settings.large_requests, self._part_images, settings.retry_after_s)
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._small_thread = ThreadPoolExecutor(1, thread_name_prefix="decode_small")

    async def score(
        self,
        requests: Mapping[int, LesionRequest],
        model: ServedModel,
        deadline: float,
        clock: StageClock,
        patient: bool = False,
        decoded: Callable[[Sequence[StoredImage]], None] | None = None,
    ) -> tuple[list[ScoredLesion], dict[int, ApiError]]:
        """Scores lesions, given by their place in the request; also which of them have no picture to score.

        Args:
            deadline: `time.monotonic()` after which nobody waits for the answer.
            patient: all are one patient's, and each is compared with the others.
            decoded: is given what will be kept of the pictures, part by part, before they are scored.

        Raises:
            ModelsDifferError: ask again, with the model that is served then.
            ApiError: a node does not answer, 503: there are too many large requests, or 409: the model compares no
                lesions of a patient.
        """
        # Parts, so that the network already runs while the next pictures are decoded; the first ones are short, or it
        # would wait for the second.
        order, parts, size = list(requests), [], min(_FIRST_PART_IMAGES, self._part_images)
        while order:
            parts.append({index: requests[index] for index in order[:size]})
            order, size = order[size:], min(2 * size, self._part_images)
        # One large request must not fill the queue in front of all others: its parts come as the first ones leave.
        room = asyncio.Semaphore(_PARTS_UNDER_WAY)
        errors: dict[int, ApiError] = {}

        async def one(part: dict[int, LesionRequest]) -> list[ScoredLesion] | _Part | None:
            async with room:
                scored = await self._score_part(part, errors, model, deadline, clock, decoded)
            turn.scored(len(part))
            if scored is None or patient:
                return scored
            records = [part[index].metadata for index in scored.images]
            fused = await self.fusion.fuse(scored.scores.log_probabilities, records)
            return _answers(scored, self._checked(fused, model, clock).risks)

        async with self._large.turn(len(requests), deadline) as turn:
            done = [part for part in await gather_or_cancel([one(part) for part in parts]) if part is not None]
        if not patient:
            return [lesion for part in done for lesion in part], errors
        return await self._compare(done, requests, model, clock), errors

    async def _compare(
        self, parts: list[_Part], requests: Mapping[int, LesionRequest], model: ServedModel, clock: StageClock
    ) -> list[ScoredLesion]:
        """Fuses all lesions of a patient at once."""
        if not parts:
            return []
        records = [requests[index].metadata for part in parts for index in part.images]
        # What the model abstains from is no measure for the others.
        trusted = np.array([not reasons for part in parts for reasons in part.reasons])
        log_probabilities = np.concatenate([part.scores.log_probabilities for part in parts])
        fused = await self.fusion.fuse_patient(log_probabilities, records, trusted)
        if fused is None:
            raise ApiError(
                409, "no_patient_context", f"model {model.reference.version} compares no lesions of a patient"
            )
        risks = iter(self._checked(fused, model, clock).risks)
        return [lesion for part in parts for lesion in _answers(part, [next(risks) for _ in part.images])]

    async def _score_part(
        self,
        part: Mapping[int, LesionRequest],
        errors: dict[int, ApiError],
        model: ServedModel,
        deadline: float,
        clock: StageClock,
        decoded: Callable[[Sequence[StoredImage]], None] | None,
    ) -> _Part | None:
        images: dict[int, PreparedImage] = {}
        for index, result in zip(part, await self.prepare(list(part.values()), model), strict=True):
            if isinstance(result, ApiError):
                errors[index] = result
            else:
                images[index] = result
        clock.end("decode")
        if not images:
            return None
        if decoded is not None:
            decoded([image.stored for image in images.values()])
        scores = await self.scorer.score(np.stack([image.pixels for image in images.values()]), deadline)
        clock.end("score")
        if scores is None or scores.digest != model.digest:
            raise ModelsDifferError
        return _Part(images, scores, self._reasons_to_abstain(list(images.values()), model, scores))

    async def prepare(
        self, requests: Sequence[LesionRequest], model: ServedModel
    ) -> Sequence[PreparedImage | ApiError]:
        """The requests' pictures, decoded, or why one is none."""
        # What was stored before was checked before.
        arguments = [(request.image, model.input_size, None if request.stored else self.limits) for request in requests]
        if len(requests) == 1 and _is_small(requests[0].image):
            return [prepare_or_error(*arguments[0])]
        run = asyncio.get_running_loop().run_in_executor
        small = [place for place, request in enumerate(requests) if _is_small(request.image)]
        large = [place for place in range(len(requests)) if place not in small]
        # Two threads with tiles mostly wait for each other: 0.38 ms a tile and 0.52 of CPU, instead of 0.30 in one.
        work = [run(self._threads, _prepare_all, [arguments[place]]) for place in large]
        if small:
            work.append(run(self._small_thread, _prepare_all, [arguments[place] for place in small]))
        prepared = [image for images in await gather_or_cancel(work) for image in images]
        found = dict(zip([*large, *small], prepared, strict=True))
        return [found[place] for place in range(len(requests))]

    async def explain(
        self, data: bytes, view: View, target_class: str | None, model: ServedModel, stored: bool = False
    ) -> Explanation:
        """See `PredictionService.explain`."""
        target = parse_class(target_class, model.task)
        run = asyncio.get_running_loop().run_in_executor
        limits = None if stored else self.limits
        picture = await run(self._threads, open_picture, data, model.input_size, limits)
        seen = await self.scorer.explain(picture.pixels[np.newaxis])
        if seen is None or seen.digest != model.digest:
            raise ModelsDifferError
        if target is None:
            target = likeliest_malignant(model.task, seen.logits)
        evidence = weight_of_evidence(seen.maps, seen.logits, seen.prior, target)
        png = await run(self._threads, draw, picture.shown, evidence, view)
        (reasons,) = self._refusals({name: [value] for name, value in picture.quality.items()}, model, seen.distances)
        codes = tuple(refusal.reason for refusal in reasons)
        return Explanation(png, model.task.classes[target], model.digest, model.reference.version, codes)

    def _checked(self, fused: FusedRisks, model: ServedModel, clock: StageClock) -> FusedRisks:
        clock.end("fuse")
        if fused.digest != model.digest:
            raise ModelsDifferError
        return fused

    def _reasons_to_abstain(
        self, images: list[PreparedImage], model: ServedModel, scores: ImageScores
    ) -> list[list[str]]:
        quality = {name: [image.quality[name] for image in images] for name in images[0].quality}
        found = self._refusals(quality, model, scores.distances)
        for image, refusals in zip(images, found, strict=True):
            if refusals:
                reasons = "; ".join(f"{refusal.reason}: {refusal.detail}" for refusal in refusals)
                logger.info("abstained from %s: %s", image.stored.hash[:12], reasons)
        return [[refusal.reason for refusal in refusals] for refusals in found]

    def _refusals(
        self, quality: Mapping[str, list[float]], model: ServedModel, distances: np.ndarray | None
    ) -> list[list[Refusal]]:
        """Why the model abstains, by picture; nothing where the model, or the operator, wants all scored."""
        if model.abstention is None or not self.settings.abstain:
            return [[] for _ in next(iter(quality.values()))]
        assert distances is not None, "the same bundle gave the scores"
        return model.abstention.refusals({name: np.array(values) for name, values in quality.items()}, distances)


def _prepare_all(arguments: Sequence[tuple[bytes, int, UploadLimits | None]]) -> list[PreparedImage | ApiError]:
    return [prepare_or_error(*given) for given in arguments]


def _is_small(data: bytes) -> bool:
    """Whether a file is decoded at once, as its header says."""
    image_format = sniff_format(data) if len(data) <= _SMALL_BYTES else None
    size = read_dimensions(data, image_format) if image_format is not None else None
    return size is not None and size[0] * size[1] <= _SMALL_PIXELS


def _answers(part: _Part, risks: Sequence[FusedRisk]) -> list[ScoredLesion]:
    return [
        ScoredLesion(index, image, part.scores[row : row + 1], part.reasons[row], risks[row])
        for row, (index, image) in enumerate(part.images.items())
    ]
