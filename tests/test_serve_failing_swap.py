"""A new model that replicas cannot load: under load, on a real cluster, with the old one answering all the while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import ray

from ray_jobs import deploy_service, service_rollout
from ray_jobs.deploy_service import DeployServiceConfig, run
from ray_jobs.job import run_job
from tests.bundle_factory import served_bundle
from tests.test_ray_jobs_deploy_service import engine_set
from tests.test_serve_app import Service, Traffic, replicas, service, versions_of_batches, wait_for

__all__ = ["service"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

MODEL_NODES = ("Ingress", "MetadataFusion", "ImageScorer")


@pytest.fixture
def flags(service, ray_connected, monkeypatch) -> dict:
    """What the running service was deployed with, its release included: another one restarts the replicas."""
    monkeypatch.setenv("DERMRAY_HOME", str(service.home))
    monkeypatch.setattr(deploy_service, "write_release", lambda *_: Path(service.config["release"]))
    return {
        "port": ray_connected.http_port,
        "drift_logger": {"attempt_timeout_s": 2},
        "scorer": {"max_replicas": 1},
    }


def unreachable(service: Service, _: pytest.MonkeyPatch) -> str:
    """A bundle that only the deploying process can read."""
    directory = service.home / "bundles" / "unreachable"
    if not directory.exists():
        served_bundle(directory, onnx_bias=2.5)
    fsspec.filesystem("memory").put(f"{directory}/", "/unreachable", recursive=True)
    return "memory://unreachable"


def engineless(service: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bundle whose engine is missing on the scorer's node alone."""
    monkeypatch.setattr(deploy_service, "load_once", lambda *_: None)
    directory = service.home / "bundles" / "engineless"
    if not directory.exists():
        reference = served_bundle(directory, onnx_bias=2.5)
        broken = engine_set(reference.sha256, "x", threads=1)
        broken.candidates[0].candidate.choice = {"engine": "abacus"}
        broken.save(service.home / "engine_sets")
    return str(directory)


def under_load(service: Service, action: Callable[[], None]) -> tuple[Traffic, list[set[str]]]:
    """Single and batch requests before, while and after `action` runs; the versions within each answer to a batch."""
    traffic = Traffic(service)
    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(versions_of_batches, service, traffic.stop)
        try:
            traffic.during(action)
        finally:
            traffic.stop.set()
        return traffic, batches.result(timeout=90)


def pids() -> dict[str, set[int]]:
    return {node: set(replicas(node)) for node in MODEL_NODES}


@pytest.mark.parametrize(
    ("bundle", "reason"),
    [(unreachable, "Ingress: no bundle at memory://"), (engineless, "ImageScorer: engine choice: unknown engine")],
)
def test_a_model_that_replicas_cannot_load_changes_nothing(service, flags, monkeypatch, capsys, bundle, reason):
    uri, before = bundle(service, monkeypatch), pids()
    arguments = ["--bundle", uri, "--port", str(flags["port"]), "--scorer.max-replicas", "1"]
    monkeypatch.setattr(sys, "argv", ["deploy_service", *arguments, "--drift-logger.attempt-timeout-s", "2"])

    def deploy() -> None:
        with pytest.raises(SystemExit) as ended:
            run_job("deploy_service", DeployServiceConfig, run)
        assert ended.value.code == 2

    traffic, batches = under_load(service, deploy)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deploy_service: error: ")]
    assert line.startswith("deploy_service: error: model version bundle-") and uri in line
    assert f"is not served: {reason}" in line and line.endswith(f"version {service.config['model_version']} goes on")
    assert traffic.failed == []
    assert batches and all(versions == {service.config["model_version"]} for versions in batches)
    assert pids() == before


def test_a_model_that_fails_at_the_switch_is_taken_back(service, flags, monkeypatch):
    """What was there when the replicas tried it is gone when they shall serve it, on one node of three."""
    uri, before = engineless(service, monkeypatch), pids()
    monkeypatch.setattr(service_rollout, "prepare_replicas", lambda *_: None)

    def deploy() -> None:
        with pytest.raises(ValueError, match="is not served: .*ImageScorer: .*abacus.*; version .* answers again"):
            run(DeployServiceConfig(bundle=uri, **flags))

    traffic = Traffic(service)
    started = time.monotonic()
    traffic.during(deploy)
    assert time.monotonic() - started < 60
    # Nodes with different models answer "later" and in order; nobody gets an answer of two models, or none.
    assert [line for line in traffic.failed if not line.startswith('503 {"error":"unavailable"')] == []
    assert service.ready() and service.predict().json()["model_version"] == service.config["model_version"]
    assert pids() == before


def test_after_a_failed_swap_a_good_one_works(service, flags, monkeypatch):
    good = served_bundle(service.home / "bundles" / "good", onnx_bias=1.5)
    before = pids()
    traffic, batches = under_load(service, lambda: run(DeployServiceConfig(bundle=good.bundle_uri, **flags)) and None)
    assert traffic.failed == [] and pids() == before
    assert {"bundle-" + good.sha256[:12]} in batches and all(len(versions) == 1 for versions in batches)
    run(DeployServiceConfig(bundle=str(service.home / "bundles" / "first"), **flags))
    assert service.predict().json()["model_version"] == service.config["model_version"]


def test_settings_that_come_with_a_broken_model_are_put_back_too(service, flags, monkeypatch):
    """Other settings restart the replicas, which then have no old model to keep."""
    uri, before = engineless(service, monkeypatch), pids()
    monkeypatch.setattr(service_rollout, "prepare_replicas", lambda *_: None)
    limits = {"max_pixels": 12_345}
    with pytest.raises(ValueError, match="did not start: .*abacus.*; version .* answers again"):
        run(DeployServiceConfig(bundle=uri, limits=limits, **flags))
    wait_for(service.ready, "readiness")
    card = service.client.get(f"{service.url}/v1/model").json()
    assert card["model_version"] == service.config["model_version"] and card["limits"]["max_pixels"] != 12_345
    assert not pids()["ImageScorer"] & before["ImageScorer"]
    assert service.predict().status_code == 200


def test_a_scorer_that_no_node_can_hold_is_refused_at_once(service, flags):
    before, more = pids(), ray.cluster_resources().get("GPU", 0) + 1
    flags["scorer"] = {"max_replicas": 1, "num_gpus": more}
    with pytest.raises(ValueError, match=f"scorer.num_gpus = {more:g}: no node of the cluster has"):
        run(DeployServiceConfig(bundle=str(service.home / "bundles" / "first"), **flags))
    assert pids() == before and service.predict().status_code == 200
