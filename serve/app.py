"""The graph on one screen: Ingress -> ImageScorer -> MetadataFusion, and DriftLogger beside them."""

from __future__ import annotations

import hashlib
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from serve.drift_logger import DriftLogger
from serve.image_scorer import ImageScorer
from serve.ingress import Ingress
from serve.metadata_fusion import MetadataFusion
from serve.settings import ModelReference, ServeSettings
from serve.shadow_settings import ServedModels, ShadowReference

# A replica that cannot be built (bundle refused, engine missing) fails its deployment instead of being tried 20 times.
_CONSTRUCTOR_ATTEMPTS = 3
# Serve notices a dead replica by its health check: with the default of 10 s a killed sidecar was back after up to 50 s.
_HEALTH_CHECK_PERIOD_S = 2.0
_SETTLE_S = 12.0


def build_app(
    settings: ServeSettings, model: ModelReference, shadow: ShadowReference | None = None
) -> serve.Application:
    """The application; a changed `model` or `shadow` alone reconfigures running replicas and restarts none.

    The shadow itself is an application of its own, see `build_shadow_app`.
    """
    user_config = model.model_dump()
    # Serve replaces every replica of an application that is run again, unless it bears the version it had.
    version = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()

    def node(logic: type, num_cpus: float, *arguments: Any, num_gpus: float = 0, **options: Any) -> serve.Application:
        actor_options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if settings.runtime_env is not None:
            actor_options["runtime_env"] = settings.runtime_env
        deployment = serve.deployment(
            logic,
            name=logic.__name__,
            ray_actor_options=actor_options,
            max_constructor_retry_count=_CONSTRUCTOR_ATTEMPTS,
            health_check_period_s=_HEALTH_CHECK_PERIOD_S,
            **options,
        )
        deployment._version = version
        return deployment.bind(*arguments)

    # The ingress logs every request; the same line from each inner node would only cost time.
    inner = {"logging_config": LoggingConfig(enable_access_log=False)}

    scorer = node(
        ImageScorer,
        settings.scorer.num_cpus,
        settings.scorer.model_dump(),
        num_gpus=settings.scorer.num_gpus,
        user_config=user_config,
        max_ongoing_requests=settings.scorer.max_ongoing_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.scorer.min_replicas,
            initial_replicas=max(1, settings.scorer.min_replicas),
            max_replicas=settings.scorer.max_replicas,
            target_ongoing_requests=settings.scorer.target_ongoing_requests,
            upscale_delay_s=settings.scorer.upscale_delay_s,
            downscale_delay_s=settings.scorer.downscale_delay_s,
        ),
        **inner,
    )
    fusion = node(
        MetadataFusion,
        settings.fusion.num_cpus,
        user_config=user_config,
        num_replicas=settings.fusion.num_replicas,
        max_ongoing_requests=settings.fusion.max_ongoing_requests,
        **inner,
    )
    drift_logger = node(
        DriftLogger,
        settings.drift_logger.num_cpus,
        settings.storage.model_dump(),
        settings.drift_logger.model_dump(),
        None,
        settings.alarms.model_dump(),
        num_replicas=1,
        max_ongoing_requests=settings.drift_logger.max_ongoing_requests,
        **inner,
    )
    return node(
        Ingress,
        settings.ingress.num_cpus,
        scorer,
        fusion,
        drift_logger,
        settings.model_dump(),
        user_config=ServedModels(champion=model, shadow=shadow).model_dump(),
        num_replicas=settings.ingress.num_replicas,
        max_ongoing_requests=settings.ingress.max_ongoing_requests,
        max_queued_requests=settings.ingress.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=settings.ingress.retry_after_s),
        # What is under way when a replica is replaced is answered, and claimed submissions are settled.
        graceful_shutdown_timeout_s=settings.ingress.request_timeout_s + _SETTLE_S,
    )
