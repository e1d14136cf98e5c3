"""What a deployed service is told: limits, sizes of the four nodes, and absolute places of its data.

The settings travel as JSON in the deployments' arguments; the model travels in `user_config`, so that a new champion
changes no argument and restarts no replica.
"""

from __future__ import annotations

import math
import os
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from monitoring.alarm_channels import ServiceAlarmSettings

APP_NAME = "dermray"

# What a replica's process needs to have in its environment, whatever the cluster's. In throughput mode replicas talk
# gRPC, whose messages end at 4 MiB unless told otherwise: a batch of pictures is larger.
REPLICA_ENVIRONMENT = {
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(512 * 2**20),
    # The guards of the door count on one event loop. In throughput mode that is so anyhow.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Stands around Serve's handling of requests, which takes any header for an id, and is dear for a refusal.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front_door:http_middlewares",
}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UploadLimits(_Settings):
    """What an upload may cost, checked before any pixel is decoded."""

    max_image_bytes: int = Field(20 * 2**20, ge=1024, description="one image file")
    max_pixels: int = Field(50_000_000, ge=64, description="width x height, read from the image's header")
    max_batch_images: int = Field(1000, ge=1, le=1000, description="images of one request; its parser takes no more")
    max_batch_bytes: int = Field(64 * 2**20, ge=1024, description="body of one /v1/predict/batch request")
    max_batch_pixels: int = Field(200_000_000, ge=64, description="all images of one /v1/predict/batch request")
    max_pause_s: int = Field(10, ge=1, le=3600, description="longest wait for the next piece of a body; then 408")
    min_bytes_per_s: int = Field(
        16 * 2**10, ge=1, le=2**30, description="average rate of a body after the first max_pause_s; below it 408"
    )


class AdmissionSettings(_Settings):
    """How many requests that need the network are inside an HTTP node's replica, and how long others wait outside.

    A body is read outside, so that no slow client holds a place.
    """

    max_requests: int = Field(64, ge=1, description="inside at a time: twice what the network takes in a batch")
    max_bytes: int = Field(512 * 2**20, ge=2**20, description="their bodies together; four times that is in memory")
    max_wait_s: float = Field(0.25, gt=0, description="no one is let in while the next picture has waited longer")
    patience_s: float = Field(0.4, gt=0, description="how long a request waits outside before it is refused with 503")
    refuse_after_s: float = Field(1.0, ge=0, description="when the refusal is sent, from its arrival on")
    max_waiting: int = Field(1000, ge=0, description="waiting outside; above it a refusal is sent at once")
    max_uploads: int = Field(512, ge=1, description="bodies on their way; above it a refusal is sent at once")
    max_waiting_bytes: int = Field(
        512 * 2**20, ge=2**20, description="bodies outside, as far as they came; above it a refusal is sent at once"
    )


class LargeRequestSettings(_Settings):
    """Requests of many pictures (more than the scorer's `max_batch_size`, or 16): so many score at a time.

    The others wait in the order in which they came; all at once, each would get a share of the network that is too
    small to end in time.
    """

    at_a_time: int = Field(
        2, ge=1, le=1024, description="in one ingress replica; raise it where two do not keep all scorers busy"
    )
    max_waiting: int = Field(
        16, ge=0, description="for their turn; above it 503 at once: those that wait take places of small requests"
    )


class IngressSettings(_Settings):
    """The HTTP node: decodes, calls the other nodes, answers."""

    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.2, ge=0)
    decode_threads: int = Field(2, ge=1)
    max_ongoing_requests: int = Field(2048, ge=1, description="above what admission lets in, wait and upload")
    max_queued_requests: int = Field(
        512, ge=-1, description="at Serve's own door, once max_ongoing_requests is reached"
    )
    request_timeout_s: float = Field(30.0, gt=0, description="after it, 503 with Retry-After")
    admission: AdmissionSettings = Field(default_factory=AdmissionSettings)
    large_requests: LargeRequestSettings = Field(default_factory=LargeRequestSettings)
    retry_after_s: int = Field(1, ge=1, description="what a 503 tells the client")
    abstain: bool = Field(True, description="give reasons instead of a risk where the model's bundle says so")
    accept_replays: bool = Field(
        False, description="take an administrator's header Replayed-At for the time a request was received"
    )


class ScorerSettings(_Settings):
    """The image network: batches across requests, scales with the load."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    num_cpus: float = Field(0.5, ge=0)
    num_gpus: float = Field(0.0, ge=0, description="per replica; 0.5: two replicas share a GPU")
    target_ongoing_requests: float = Field(
        2, gt=0, description="calls per replica; each carries the pictures that waited together"
    )
    max_ongoing_requests: int = Field(128, ge=1)
    max_batch_size: int = Field(32, ge=1)
    max_concurrent_batches: int = Field(
        2, ge=1, description="that the engine runs side by side: many pictures at once use a second core, if it is idle"
    )
    batch_wait_timeout_s: float = Field(
        0.0, ge=0, description="ingress replicas already send together what waits; a wait only adds to latency"
    )
    patience_s: float = Field(
        0.02, ge=0, description="how long a picture waits for the call before it to end, to share the next"
    )
    enough_images: int = Field(12, ge=1, description="so many that wait are sent at once")
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> ScorerSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; expected at least min_replicas {self.min_replicas}")
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(f"num_gpus is {self.num_gpus:g}; expected a part of one GPU, or whole ones")
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests is {self.max_ongoing_requests}; expected at least max_batch_size "
                f"{self.max_batch_size}, or no batch is ever full"
            )
        return self

    @property
    def calls_under_way(self) -> int:
        """How many calls an ingress replica makes at a time: as many as it takes to scale to `max_replicas`.

        More would split the pictures that wait into smaller calls.
        """
        return max(2, math.ceil(self.target_ongoing_requests * self.max_replicas))


class FusionSettings(_Settings):
    """Metadata fusion, calibration and thresholds."""

    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.1, ge=0)
    max_ongoing_requests: int = Field(128, ge=1)


class DriftLoggerSettings(_Settings):
    """The sidecar that commits predictions, and how long an ingress waits for it before it spools."""

    num_cpus: float = Field(0.1, ge=0)
    max_ongoing_requests: int = Field(256, ge=1)
    attempts: int = Field(2, ge=1, description="calls with the same ids before the ingress spools")
    attempt_timeout_s: float = Field(4.0, gt=0)
    replay_interval_s: float = Field(1.0, gt=0, description="between tries to empty the spool")
    sweep_interval_s: float | None = Field(
        86_400.0, gt=0, le=31_536_000, description="between sweeps for image files that no record names; null: none"
    )
    sweep_min_age_s: float = Field(3600.0, gt=0, description="age below which a sweep leaves an image file alone")


class SubmissionSettings(_Settings):
    """The queue of submissions: how many may wait, and how an ingress replica works through them."""

    max_pending: int = Field(1000, ge=1, description="queued submissions; beyond them, 429 with Retry-After")
    concurrency: int = Field(8, ge=1, description="submissions that one ingress replica scores at a time")
    lease_s: float = Field(60.0, gt=0, description="after it, another replica takes over what one has not finished")
    attempts: int = Field(12, ge=1, description="tries before a submission fails for good")
    backoff_s: float = Field(5.0, gt=0, description="wait after the first failed try; doubled after each, to an hour")
    poll_interval_s: float = Field(5.0, gt=0, description="between looks for what other replicas left")


class StorageSettings(_Settings):
    """Where predictions go; absolute paths or URLs, because a replica's working directory is temporary.

    `patient_key_file` holds the secret behind patient pseudonyms; it is read by the ingress and never logged.
    """

    store_url: str
    images_url: str
    spool_dir: str
    patient_key_file: str

    @field_validator("spool_dir", "patient_key_file")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not os.path.isabs(value):
            raise ValueError(f"{value!r} is relative; expected an absolute path")
        return value


class AccessSettings(_Settings):
    """Who may call, and how often."""

    require_keys: bool = Field(False, description="every request but health, model card and pages needs X-API-Key")
    refresh_s: float = Field(5.0, gt=0, le=300, description="after it a revoked key is refused, and a new one works")
    requests_per_s: float | None = Field(None, gt=0, description="per key and ingress replica; null sets no limit")
    burst: int = Field(20, ge=1, description="requests that a key may send at once, where requests_per_s is set")

    @model_validator(mode="after")
    def _consistent(self) -> AccessSettings:
        if self.requests_per_s is not None and not self.require_keys:
            raise ValueError("requests_per_s is a limit per key; expected require_keys: true with it")
        return self


class LinkSettings(_Settings):
    """Where the pages of other tools are, for /monitoring; null: it says how to start them."""

    ray_dashboard: str | None = Field(None, description="Ray's dashboard, http or https")
    mlflow: str | None = Field(None, description="MLflow's pages")
    evidently: str | None = Field(None, description="Evidently's pages, with the reports of check_drift")
    grafana: str | None = Field(None, description="Grafana, with deploy/grafana/dermray.json")

    @field_validator("*")
    @classmethod
    def _is_a_page(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        own = parts.scheme in ("http", "https") and parts.hostname and parts.username is None
        if not own or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError(
                f"{value!r}; expected an http or https address without a password, such as http://host:8265"
            )
        return value


class ServeSettings(_Settings):
    """Everything but the model."""

    storage: StorageSettings
    limits: UploadLimits = Field(default_factory=UploadLimits)
    ingress: IngressSettings = Field(default_factory=IngressSettings)
    scorer: ScorerSettings = Field(default_factory=ScorerSettings)
    fusion: FusionSettings = Field(default_factory=FusionSettings)
    drift_logger: DriftLoggerSettings = Field(default_factory=DriftLoggerSettings)
    access: AccessSettings = Field(default_factory=AccessSettings)
    submissions: SubmissionSettings = Field(default_factory=SubmissionSettings)
    alarms: ServiceAlarmSettings = Field(default_factory=ServiceAlarmSettings)
    links: LinkSettings = Field(default_factory=LinkSettings)
    runtime_env: dict[str, Any] | None = Field(None, description="code and environment of every replica")

    @model_validator(mode="after")
    def _leases_last(self) -> ServeSettings:
        lease, request = self.submissions.lease_s, self.ingress.request_timeout_s
        if lease <= request:
            raise ValueError(
                f"submissions.lease_s is {lease:g}; expected more than ingress.request_timeout_s {request:g}, or a "
                "lease ends while its submission is still being scored"
            )
        return self

    @model_validator(mode="after")
    def _sweeps_spare_requests(self) -> ServeSettings:
        age, request = self.drift_logger.sweep_min_age_s, self.ingress.request_timeout_s
        if self.drift_logger.sweep_interval_s is not None and age <= request:
            raise ValueError(
                f"drift_logger.sweep_min_age_s is {age:g}; expected more than ingress.request_timeout_s {request:g}, "
                "or a sweep removes images of requests under way"
            )
        return self


class ModelReference(_Settings):
    """Which bundle to serve: the `user_config` of the three nodes that hold a model.

    `engine` is what `modeling.engines.create_engine` takes; None is its default.
    """

    bundle_uri: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    version: str = Field(min_length=1, max_length=64)
    engine: dict[str, Any] | None = None
