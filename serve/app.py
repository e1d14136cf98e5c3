"""The graph on one screen: Ingress -> ImageScorer -> MetadataFusion, and DriftLogger beside them."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from serve.drift_logger import DriftLogger
from serve.image_scorer import ImageScorer
from serve.ingress import Ingress
from serve.metadata_fusion import MetadataFusion
from serve.settings import ModelReference, ServeSettings

# A replica that cannot be built (bundle refused, engine missing) fails its deployment instead of being tried 20 times.
_CONSTRUCTOR_ATTEMPTS = 3


def build_app(settings: ServeSettings, model: ModelReference) -> serve.Application:
    """The application; a changed `model` alone reconfigures running replicas and restarts none."""
    user_config = model.model_dump()

    def options(num_cpus: float, **more: Any) -> dict[str, Any]:
        actor = {"num_cpus": num_cpus, **more}
        if settings.runtime_env is not None:
            actor["runtime_env"] = settings.runtime_env
        return {"ray_actor_options": actor, "max_constructor_retry_count": _CONSTRUCTOR_ATTEMPTS}

    # The ingress logs every request; the same line from each inner node would only cost time.
    inner = {"logging_config": LoggingConfig(enable_access_log=False)}

    scorer = serve.deployment(
        ImageScorer,
        name="ImageScorer",
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
        **options(settings.scorer.num_cpus, num_gpus=settings.scorer.num_gpus),
    ).bind(settings.scorer.model_dump())

    fusion = serve.deployment(
        MetadataFusion,
        name="MetadataFusion",
        user_config=user_config,
        num_replicas=settings.fusion.num_replicas,
        max_ongoing_requests=settings.fusion.max_ongoing_requests,
        **inner,
        **options(settings.fusion.num_cpus),
    ).bind()

    drift_logger = serve.deployment(
        DriftLogger,
        name="DriftLogger",
        num_replicas=1,
        max_ongoing_requests=settings.drift_logger.max_ongoing_requests,
        **inner,
        **options(settings.drift_logger.num_cpus),
    ).bind(settings.storage.model_dump())

    return serve.deployment(
        Ingress,
        name="Ingress",
        user_config=user_config,
        num_replicas=settings.ingress.num_replicas,
        max_ongoing_requests=settings.ingress.max_ongoing_requests,
        max_queued_requests=settings.ingress.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=settings.ingress.retry_after_s),
        **options(settings.ingress.num_cpus),
    ).bind(scorer, fusion, drift_logger, settings.model_dump())
