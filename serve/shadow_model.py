"""The shadow's side of the graph: one replica that holds a whole challenger, in an application of its own.

Its own, because it comes, goes and fails without the champion's: no replica of the service is replaced, and without a
shadow there is no process more.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from typing import Any

import numpy as np
from ray import serve
from ray.serve.api import RunTarget, run_many
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from serve.durable_log import DurableLog
from serve.image_scorer import ActivationMap, ImageScorer, ImageScores
from serve.metadata_fusion import FusedRisks, MetadataFusion
from serve.metrics import NoMetrics
from serve.nodes import FusionNode, ScorerNode
from serve.prediction_service import PredictionService
from serve.served_model import ServedModel
from serve.settings import ServeSettings
from serve.shadow_scoring import CopyScoring, ShadowScoring
from serve.shadow_settings import SHADOW_APP_PREFIX, ShadowReference

logger = logging.getLogger("ray.serve")

_NAME = "ShadowModel"
# As the champion's nodes.
_CONSTRUCTOR_ATTEMPTS = 3
_HEALTH_CHECK_PERIOD_S = 2.0


class ShadowModel:
    """Deployment: image node and fusion node in one process, which leaves the CPU to the champion's."""

    def __init__(self, scorer_settings: dict[str, Any], niceness: int):
        # The figures of these classes are the champion's.
        self._scorer = ImageScorer(scorer_settings, NoMetrics())
        self._fusion = MetadataFusion(NoMetrics())
        self._niceness = niceness

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the bundle of a `ModelReference`; the replica keeps its old one when that fails."""
        # On Linux it is a thread's, and inherited: the engine's threads are started from this one.
        if os.getpriority(os.PRIO_PROCESS, 0) < self._niceness:
            os.setpriority(os.PRIO_PROCESS, 0, self._niceness)
        await asyncio.gather(self._scorer.reconfigure(config), self._fusion.reconfigure(config))

    async def score(
        self, images: np.ndarray, time_left_s: float, request_ids: tuple[str, ...] = ()
    ) -> ImageScores | None:
        """See `ImageScorer.score`."""
        return await self._scorer.score(images, time_left_s, request_ids)

    async def explain(self, image: np.ndarray, request_ids: tuple[str, ...] = ()) -> ActivationMap | None:
        """See `ImageScorer.explain`."""
        return await self._scorer.explain(image, request_ids)

    async def fuse(self, log_probabilities: np.ndarray, records: list, request_ids: tuple[str, ...] = ()) -> FusedRisks:
        """See `MetadataFusion.fuse`."""
        return await self._fusion.fuse(log_probabilities, records, request_ids)

    async def fuse_patient(
        self, log_probabilities: np.ndarray, records: list, trusted: np.ndarray, request_ids: tuple[str, ...] = ()
    ) -> FusedRisks | None:
        """See `MetadataFusion.fuse_patient`."""
        return await self._fusion.fuse_patient(log_probabilities, records, trusted, request_ids)

    async def describe(self, request_ids: tuple[str, ...] = ()) -> dict[str, Any]:
        return {**await self._scorer.describe(), **await self._fusion.describe()}


def build_shadow_app(settings: ServeSettings, shadow: ShadowReference) -> serve.Application:
    """The application of one shadow, to be run under `shadow.app_name` and no route."""
    actor_options: dict[str, Any] = {"num_cpus": shadow.settings.num_cpus, "num_gpus": shadow.settings.num_gpus}
    if settings.runtime_env is not None:
        actor_options["runtime_env"] = settings.runtime_env
    deployment = serve.deployment(
        ShadowModel,
        name=_NAME,
        num_replicas=1,
        ray_actor_options=actor_options,
        user_config=shadow.model.model_dump(),
        max_ongoing_requests=settings.scorer.max_ongoing_requests,
        max_constructor_retry_count=_CONSTRUCTOR_ATTEMPTS,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    arguments = (settings.scorer.model_dump(), shadow.settings.niceness)
    # As in build_app: the same version, the same replica.
    deployment._version = hashlib.sha256(repr((settings.model_dump_json(), arguments)).encode()).hexdigest()
    return deployment.bind(*arguments)


def run_shadow(settings: ServeSettings, shadow: ShadowReference) -> None:
    """Starts or updates a shadow's application; returns before it runs."""
    target = RunTarget(build_shadow_app(settings, shadow), name=shadow.app_name, route_prefix=None)
    run_many([target], wait_for_applications_running=False)


def running_shadows() -> list[str]:
    """Names of the shadows' applications."""
    return [name for name in serve.status().applications if name.startswith(SHADOW_APP_PREFIX)]


def delete_shadow(app_name: str) -> None:
    """Ends a shadow; not waited for, because behind HAProxy its replica takes half a minute."""
    serve.delete(app_name, _blocking=False)


def shadow_handle(shadow: ShadowReference) -> DeploymentHandle:
    """A handle to the shadow's deployment, whether or not it runs; calls wait until it does."""
    return serve.get_deployment_handle(_NAME, shadow.app_name, _check_exists=False)


async def switch_shadow(
    service: PredictionService, wanted: ShadowReference | None, settings: ServeSettings, log: DurableLog
) -> None:
    """Has the service's answers scored by this shadow from now on; the one that it has already stays as it is.

    A shadow that does not load leaves the service without one: a replica that starts when the shadow's bundle is gone
    must answer with the champion all the same.
    """
    if service.shadow is not None and service.shadow.reference == wanted:
        return
    service.use_shadow(None)
    if wanted is None:
        return
    try:
        # Hashing a bundle, or fetching it, takes seconds in which others want their answers.
        load = asyncio.get_running_loop().run_in_executor
        model = await load(None, ServedModel.load, wanted.model)
        handle = shadow_handle(wanted)
    except Exception as error:
        logger.error("no shadow: model %s does not load: %r", wanted.model.version, error)
        return
    one_replica = settings.scorer.model_copy(update={"min_replicas": 1, "max_replicas": 1})
    scoring = CopyScoring(
        ScorerNode(handle, one_replica, settings.ingress.retry_after_s),
        FusionNode(handle, settings.ingress.retry_after_s),
        settings.limits,
        settings.ingress.model_copy(update={"decode_threads": 1}),
        settings.scorer.max_batch_size,
    )
    service.use_shadow(ShadowScoring(wanted, model, scoring, log))
