"""Deploys or updates the HTTP service for the champion, and waits until it answers with that model. A model that does
not load on every replica changes nothing, and a service that does not come up gets back what it had. With `--shadow` a
challenger scores a copy of the traffic beside it; without, none does.

The service runs on the cluster of RAY_ADDRESS or of the submitted job and outlives this job: its replicas take their
code from a zip file below `releases`, their model from the registry's bundle, and hold absolute paths only.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_pipelines.cluster_nodes import cluster_nodes
from modeling.bundle import Bundle, load_bundle
from modeling.engine_set import find_engine_set
from modeling.registry import Registry, find_model
from monitoring.alarm_channels import ServiceAlarmSettings
from ray_jobs.job import REPO_ROOT, JobConfig, Location, connect_ray, dermray_home, run_job, say
from ray_jobs.model_swap import Deployed, running_service
from ray_jobs.service_rollout import Rollout
from ray_jobs.service_room import check_room
from ray_jobs.service_store import check_store, upgrade_store
from serve.image_scorer import ImageScorerLogic
from serve.metadata_fusion import MetadataFusionLogic
from serve.release import write_release
from serve.settings import (
    REPLICA_ENVIRONMENT,
    AccessSettings,
    DriftLoggerSettings,
    FusionSettings,
    IngressSettings,
    LinkSettings,
    ModelReference,
    ScorerSettings,
    ServeSettings,
    StorageSettings,
    SubmissionSettings,
    UploadLimits,
)
from serve.shadow_settings import ShadowReference, ShadowSettings
from store.synced_files import replacing


class DeployServiceConfig(JobConfig):
    model: str = Field("champion", description="alias or version in the registry")
    bundle: Location | None = Field(None, description="serve this bundle instead, without a registry")
    shadow: str | None = Field(None, description="challenger beside it: registry alias, version, or a bundle's path")
    shadowing: ShadowSettings = Field(default_factory=ShadowSettings)
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"
    engine_sets: Location = "engine_sets"
    store_url: Location = "sqlite:///store.db"
    images_url: Location = "images"
    spool_dir: Location = "spool"
    patient_key_file: Location = Field("secrets/patient_hmac.key", description="made if missing")
    releases: Location = "releases"
    host: str = Field("127.0.0.1", description="address to listen on; any but loopback needs access.require_keys")
    port: int = Field(8000, ge=1, le=65535)
    ready_timeout_s: float = Field(180.0, gt=0)
    limits: UploadLimits = Field(default_factory=UploadLimits)
    ingress: IngressSettings = Field(default_factory=IngressSettings)
    scorer: ScorerSettings = Field(default_factory=ScorerSettings)
    fusion: FusionSettings = Field(default_factory=FusionSettings)
    drift_logger: DriftLoggerSettings = Field(default_factory=DriftLoggerSettings)
    access: AccessSettings = Field(default_factory=AccessSettings)
    submissions: SubmissionSettings = Field(default_factory=SubmissionSettings)
    alarms: ServiceAlarmSettings = Field(default_factory=ServiceAlarmSettings)
    links: LinkSettings = Field(default_factory=LinkSettings)

    @field_validator("host")
    @classmethod
    def _address(cls, value: str) -> str:
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ValueError("expected an IP address such as 127.0.0.1 (loopback) or 0.0.0.0 (all)") from None
        return value

    @model_validator(mode="after")
    def _open_on_loopback_only(self) -> DeployServiceConfig:
        if not ipaddress.ip_address(self.host).is_loopback and not self.access.require_keys:
            raise ValueError(
                f"host {self.host} is not a loopback address, and anyone could call; set access.require_keys: true"
            )
        return self

    @property
    def url(self) -> str:
        """Where this host reaches the service, also when it listens on all addresses."""
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:
            return f"http://{'[::1]' if address.version == 6 else '127.0.0.1'}:{self.port}"
        return f"http://{f'[{self.host}]' if address.version == 6 else self.host}:{self.port}"


def resolve_model(config: DeployServiceConfig) -> ModelReference:
    """The bundle to serve, verified, with the engine that export_engine chose for this device.

    Raises:
        ValueError: no such model or bundle, hashes that do not fit, or no engine that passed.
    """
    if config.bundle is not None:
        bundle = load_bundle(config.bundle)
        return _reference(config, config.bundle, bundle)
    found = Registry(config.tracking_uri, config.model_name, config.artifact_root).resolve(config.model)
    return _reference(config, found.uri, load_bundle(found.uri, found.digest), found.version)


def resolve_shadow(config: DeployServiceConfig, champion: ModelReference) -> ShadowReference | None:
    """The challenger of `shadow`, verified as the champion is; None where there is to be none.

    Raises:
        ValueError: as `resolve_model`, or a model that was trained for something else than the champion.
    """
    if config.shadow is None:
        return None
    try:
        found = find_model(config.shadow, config.tracking_uri, config.model_name, config.artifact_root)
        bundle = load_bundle(found.uri, found.digest)
        model = _reference(config, found.uri, bundle, found.version)
    except ValueError as error:
        raise ValueError(f"shadow = {config.shadow!r}: {error}") from error
    served = load_bundle(champion.bundle_uri, champion.sha256).task
    unknown = sorted(set(bundle.task.columns) - set(served.columns))
    if unknown:
        say(f"the champion takes no {', '.join(unknown)}: the shadow scores as if nobody had given it")
    if model.sha256 == champion.sha256:
        say("the shadow is the champion itself")
    return ShadowReference(model=model, settings=config.shadowing)


def _reference(config: DeployServiceConfig, uri: str, bundle: Bundle, version: str = "") -> ModelReference:
    engine_set = find_engine_set(config.engine_sets, bundle.digest)
    if engine_set is None:
        say(f"no engine set for bundle {uri} and this device (export_engine makes one): ONNX Runtime with one thread")
    engine = None if engine_set is None else engine_set.choice
    version = version or f"bundle-{bundle.digest[:12]}"
    return ModelReference(bundle_uri=uri, sha256=bundle.digest, version=version, engine=engine)


def load_once(model: ModelReference, scorer: ScorerSettings) -> None:
    """Loads what the replicas will load, so that a model that does not load never reaches a running service.

    Raises:
        ValueError: why it does not load.
    """
    MetadataFusionLogic(model)
    # This process need not have the replicas' GPU.
    if scorer.num_gpus == 0:
        ImageScorerLogic(model, scorer.max_batch_size)


def ensure_patient_key(path: Path) -> None:
    """Makes the secret behind patient pseudonyms, readable by its owner only, unless it is there.

    Raises:
        ValueError: it is there and empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        with replacing(path) as temporary:
            # Under the folder's lock: what another deploy has made meanwhile stays.
            secret = path.read_bytes() if path.exists() else secrets.token_bytes(32)
            temporary.touch(mode=0o600)
            temporary.write_bytes(secret)
    if path.stat().st_size == 0:
        raise ValueError(f"patient_key_file {path} is empty; expected a secret")


def serve_settings(config: DeployServiceConfig, release: Path) -> ServeSettings:
    """What the replicas are told."""
    return ServeSettings(
        storage=StorageSettings(
            store_url=config.store_url,
            images_url=config.images_url,
            spool_dir=config.spool_dir,
            patient_key_file=config.patient_key_file,
        ),
        limits=config.limits,
        ingress=config.ingress,
        scorer=config.scorer,
        fusion=config.fusion,
        drift_logger=config.drift_logger,
        access=config.access,
        submissions=config.submissions,
        alarms=config.alarms,
        links=config.links,
        runtime_env={
            "working_dir": release.as_uri(),
            "env_vars": {**REPLICA_ENVIRONMENT, "DERMRAY_HOME": str(dermray_home())},
        },
    )


def connect(runtime_env: dict[str, Any] | None) -> None:
    """Connects to the cluster that shall run the service.

    Raises:
        ValueError: there is none that outlives this process.
    """
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        connect_ray()
    elif os.environ.get("RAY_ADDRESS"):
        # Without a working directory of its own, a driver's current folder comes first on the path of every worker, and
        # replicas would run whatever the checkout holds when they start.
        ray.init(runtime_env=runtime_env, logging_level="warning")
    else:
        raise ValueError("no Ray cluster: submit this job, or set RAY_ADDRESS; the service would end with this process")


def start_serve(config: DeployServiceConfig) -> None:
    """Starts Serve on this cluster, or checks that it listens where the config says.

    Raises:
        ValueError: the port is taken, or Serve listens elsewhere.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        running = _get_global_client().http_config
    except RayServeException:
        with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, config.port))
            except OSError as error:
                raise ValueError(f"port {config.port}: {error.strerror}; give another --port") from error
        # One node; on several, every node that holds a replica gets a proxy.
        serve.start(
            proxy_location=ProxyLocation.EveryNode, http_options=HTTPOptions(host=config.host, port=config.port)
        )
        return
    if (running.host, running.port) != (config.host, config.port):
        raise ValueError(
            f"Serve listens on {running.host}:{running.port} already, not {config.host}:{config.port}; "
            f"give --port {running.port}, or shut Serve down first"
        )


def run(config: DeployServiceConfig) -> dict[str, Any]:
    """Deploys; returns where the service answers and which model.

    What can be refused is refused first, and the store is upgraded only when all that can be known beforehand is well.
    """
    model = resolve_model(config)
    shadow = resolve_shadow(config, model)
    load_once(model, config.scorer)
    if shadow is not None:
        load_once(shadow.model, config.scorer.model_copy(update={"num_gpus": shadow.settings.num_gpus}))
    check_store(config.store_url, config.access.require_keys)
    ensure_patient_key(Path(config.patient_key_file))
    release = write_release(REPO_ROOT, Path(config.releases))
    settings = serve_settings(config, release)
    connect(settings.runtime_env)
    check_room(settings, cluster_nodes())
    if not ipaddress.ip_address(config.host).is_loopback:
        say(f"{config.host} is reached from outside, and keys and pictures travel in clear: put TLS in front")
    for channel in config.alarms.channels:
        for name in channel.missing_variables():
            say(f"alarms: channel {channel.name} needs {name} in the environment of the cluster's nodes; not set here")
    start_serve(config)
    rollout, previous = Rollout(config.url, config.ready_timeout_s), running_service()
    if previous is not None:
        previous = rollout.finish_putting_back(previous)
    if shadow is not None:
        rollout.start_shadow(settings, shadow, previous)
    rollout.deploy_or_put_back(Deployed(settings, model, shadow), previous, lambda: upgrade_store(config.store_url))
    card = rollout.model_card() or {}
    return {
        "url": config.url,
        "docs": f"{config.url}/docs",
        "model_version": model.version,
        "digest": model.sha256,
        "engine": card.get("engine"),
        "shadow": None if shadow is None else shadow.model.version,
        "release": str(release),
    }


if __name__ == "__main__":
    run_job("deploy_service", DeployServiceConfig, run, __doc__)
