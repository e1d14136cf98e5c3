"""The other deployments as the ingress calls them: a call whose replica died is made again on another."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from monitoring.prediction_log import PredictionRecord
from serve.drift_logger import Ack, LogEntry
from serve.errors import ApiError, unavailable
from serve.image_scorer import ActivationMap, ImageScores
from serve.metadata_fusion import FusedRisks
from serve.request_ids import current_ids
from serve.settings import ScorerSettings
from serve.shared_calls import SharedCalls

logger = logging.getLogger("ray.serve")

# A dead replica fails all its calls at once; the router learns of it with the first. Deadlines are the caller's.
_ATTEMPTS = 5
_RETRY_S = 0.05
_DEAD_REPLICA = (RayActorError, ReplicaUnavailableError)
# Lesions of one call to the fusion node, 0.1 ms each.
_FUSED = 256


@dataclass(frozen=True)
class _Pictures:
    """What one request wants scored by `deadline` (`time.monotonic()`)."""

    images: np.ndarray
    deadline: float


@dataclass(frozen=True)
class _Lesions:
    """What one request wants fused."""

    log_probabilities: np.ndarray
    records: list


def _direct(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle as this replica's environment wants it, not as that of the process that deployed the graph.

    In throughput mode replicas call each other over gRPC, for half the CPU time of an actor call.
    """
    return handle.options(
        _by_reference=not RAY_SERVE_USE_GRPC_BY_DEFAULT,
        request_serialization="pickle",
        response_serialization="pickle",
    )


def _rows(counts: list[int]) -> list[slice]:
    """The rows of each of several parts that were joined."""
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


async def call_again(method: Any, *arguments: Any, retry_after_s: int) -> Any:
    """Calls a handle's method, again when the replica died under the call: scoring has no side effect.

    The ids of the requests that it is for are added as the last argument.

    Raises:
        ApiError: 503 when the queue is full, the deployment failed, or replica after replica dies.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        response = method.remote(*arguments, current_ids())
        try:
            return await response
        except asyncio.CancelledError:
            # The replica need not finish what nobody waits for.
            response.cancel()
            raise
        except _DEAD_REPLICA as error:
            logger.error("a replica died under a call (attempt %d): %r", attempt, error)
            await asyncio.sleep(_RETRY_S * attempt)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise unavailable(error.message, retry_after_s) from error
    raise unavailable(f"replicas of {method.deployment_name} die under this call", retry_after_s)


async def _by_shape(
    group: list[Any], shape: Callable[[Any], tuple[int, ...]], call: Callable[[list[Any]], Awaitable[list[Any]]]
) -> list[Any]:
    """Makes one call for all items of a shape; their answers in the group's order."""
    answers: dict[int, Any] = {}
    for wanted in dict.fromkeys(map(shape, group)):
        places = [place for place, item in enumerate(group) if shape(item) == wanted]
        answers.update(zip(places, await call([group[place] for place in places]), strict=True))
    return [answers[place] for place in range(len(group))]


class ScorerNode:
    """`Scorer` over the ImageScorer handle: pictures of requests that wait at the same time share calls."""

    def __init__(self, handle: DeploymentHandle, settings: ScorerSettings, retry_after_s: int):
        handle = _direct(handle)
        self._score_method, self._explain_method = handle.score, handle.explain
        self._describe_method = handle.describe
        self._retry_after_s = retry_after_s
        self._calls: SharedCalls[_Pictures, ImageScores | None] = SharedCalls(
            self._score,
            size=lambda pictures: len(pictures.images),
            max_size=settings.max_batch_size,
            concurrency=settings.calls_under_way,
            patience_s=settings.patience_s,
            enough=settings.enough_images,
            keep_cancelled=False,
        )

    async def score(self, images: np.ndarray, deadline: float) -> ImageScores | None:
        return await self._calls.submit(_Pictures(images, deadline))

    async def _score(self, group: list[_Pictures]) -> list[ImageScores | None]:
        # While a model with another input size is rolled out, pictures of both sizes wait together.
        return await _by_shape(group, lambda pictures: pictures.images.shape[1:], self._score_alike)

    async def _score_alike(self, group: list[_Pictures]) -> list[ImageScores | None]:
        images = group[0].images if len(group) == 1 else np.concatenate([pictures.images for pictures in group])
        left = max(pictures.deadline for pictures in group) - time.monotonic()
        scores = await call_again(self._score_method, images, left, retry_after_s=self._retry_after_s)
        if scores is None:
            return [None] * len(group)
        return [scores[rows] for rows in _rows([len(pictures.images) for pictures in group])]

    def oldest_wait_s(self) -> float:
        """For how long the picture that is next has waited to be sent."""
        return self._calls.oldest_wait_s()

    async def explain(self, image: np.ndarray) -> ActivationMap | None:
        return await call_again(self._explain_method, image, retry_after_s=self._retry_after_s)

    async def describe(self) -> dict[str, Any]:
        return await call_again(self._describe_method, retry_after_s=self._retry_after_s)


class FusionNode:
    """`Fusion` over the MetadataFusion handle: lesions that wait at the same time share calls."""

    def __init__(self, handle: DeploymentHandle, retry_after_s: int):
        handle = _direct(handle)
        self._fuse_method, self._patient_method = handle.fuse, handle.fuse_patient
        self._describe_method = handle.describe
        self._retry_after_s = retry_after_s
        self._calls: SharedCalls[_Lesions, FusedRisks] = SharedCalls(
            self._fuse, size=lambda lesions: len(lesions.records), max_size=_FUSED, keep_cancelled=False
        )

    async def fuse(self, log_probabilities: np.ndarray, records: list) -> FusedRisks:
        return await self._calls.submit(_Lesions(log_probabilities, records))

    async def fuse_patient(
        self, log_probabilities: np.ndarray, records: list, trusted: np.ndarray
    ) -> FusedRisks | None:
        arguments = (log_probabilities, records, trusted)
        return await call_again(self._patient_method, *arguments, retry_after_s=self._retry_after_s)

    async def _fuse(self, group: list[_Lesions]) -> list[FusedRisks | Exception]:
        return await _by_shape(group, lambda lesions: lesions.log_probabilities.shape[1:], self._fuse_alike)

    async def _fuse_alike(self, group: list[_Lesions]) -> list[FusedRisks | Exception]:
        try:
            return await self._fuse_together(group)
        except ApiError:
            raise
        except Exception as error:
            if len(group) == 1:
                return [error]
            # One request's scores that cannot be fused must not take its neighbours along.
            return [answer for lesions in group for answer in await self._fuse_alike([lesions])]

    async def _fuse_together(self, group: list[_Lesions]) -> list[FusedRisks]:
        log_probabilities = np.concatenate([lesions.log_probabilities for lesions in group])
        records = [record for lesions in group for record in lesions.records]
        fused = await call_again(self._fuse_method, log_probabilities, records, retry_after_s=self._retry_after_s)
        return [
            FusedRisks(fused.digest, fused.risks[rows]) for rows in _rows([len(lesions.records) for lesions in group])
        ]

    async def describe(self) -> dict[str, Any]:
        return await call_again(self._describe_method, retry_after_s=self._retry_after_s)


class SidecarNode:
    """`Sidecar` over the DriftLogger handle; retries are the caller's, which spools."""

    def __init__(self, handle: DeploymentHandle):
        handle = _direct(handle)
        self._write_method, self._find_method, self._ping_method = handle.write, handle.find, handle.ping

    async def write(self, entries: list[LogEntry]) -> Sequence[Ack | Exception]:
        return await self._write_method.remote(entries, current_ids())

    async def find(self, caller: str, keys: list[str]) -> list[PredictionRecord | None]:
        return await self._find_method.remote(caller, keys, current_ids())

    async def ping(self) -> bool:
        return await self._ping_method.remote()
