"""The other deployments as the ingress calls them: a call whose replica died is made again on another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from monitoring.prediction_log import PredictionRecord
from serve.drift_logger import Ack, LogEntry
from serve.errors import unavailable
from serve.image_scorer import ActivationMap, ImageScores
from serve.metadata_fusion import FusedRisks

logger = logging.getLogger("ray.serve")

# A dead replica fails all its calls at once; the router learns of it with the first. Deadlines are the caller's.
_ATTEMPTS = 5
_RETRY_S = 0.05
_DEAD_REPLICA = (RayActorError, ReplicaUnavailableError)


async def call_again(method: Any, *arguments: Any, retry_after_s: int) -> Any:
    """Calls a handle's method, again when the replica died under the call: scoring has no side effect.

    Raises:
        ApiError: 503 when the queue is full, the deployment failed, or replica after replica dies.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await method.remote(*arguments)
        except _DEAD_REPLICA as error:
            logger.error("a replica died under a call (attempt %d): %r", attempt, error)
            await asyncio.sleep(_RETRY_S * attempt)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise unavailable(error.message, retry_after_s) from error
    raise unavailable(f"replicas of {method.deployment_name} die under this call", retry_after_s)


class ScorerNode:
    """`Scorer` over the ImageScorer handle."""

    def __init__(self, handle: DeploymentHandle, retry_after_s: int):
        self._handle = handle
        self._retry_after_s = retry_after_s

    async def score(self, images: np.ndarray) -> ImageScores | None:
        """One picture joins a batch with other requests' pictures; several are a batch of their own."""
        method = self._handle.score_one if len(images) == 1 else self._handle.score_many
        return await call_again(method, images, retry_after_s=self._retry_after_s)

    async def explain(self, image: np.ndarray) -> ActivationMap | None:
        return await call_again(self._handle.explain, image, retry_after_s=self._retry_after_s)

    async def describe(self) -> dict[str, Any]:
        return await call_again(self._handle.describe, retry_after_s=self._retry_after_s)


class FusionNode:
    """`Fusion` over the MetadataFusion handle."""

    def __init__(self, handle: DeploymentHandle, retry_after_s: int):
        self._handle = handle
        self._retry_after_s = retry_after_s

    async def fuse(self, log_probabilities: np.ndarray, records: list) -> FusedRisks:
        return await call_again(self._handle.fuse, log_probabilities, records, retry_after_s=self._retry_after_s)

    async def describe(self) -> dict[str, Any]:
        return await call_again(self._handle.describe, retry_after_s=self._retry_after_s)


class SidecarNode:
    """`Sidecar` over the DriftLogger handle; retries are the caller's, which spools."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def write(self, entries: list[LogEntry]) -> Sequence[Ack | Exception]:
        return await self._handle.write.remote(entries)

    async def find(self, caller: str, keys: list[str]) -> list[PredictionRecord | None]:
        return await self._handle.find.remote(caller, keys)

    async def ping(self) -> bool:
        return await self._handle.ping.remote()
