"""A challenger beside the real graph: it comes, dies, changes and goes under load, and the service notices nothing."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import ray

from ray_jobs.deploy_service import DeployServiceConfig, run
from serve.drift_logger import open_log
from serve.shadow_settings import SHADOW_APP_PREFIX
from store.shadow_agreement import shadow_agreement
from store.shadow_records import SHADOW_SUFFIX
from tests.bundle_factory import served_bundle
from tests.test_serve_app import FORBIDDEN, Service, Traffic, replicas, service, wait_for

__all__ = ["service"]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

CHAMPION_NODES = ("Ingress", "ImageScorer", "MetadataFusion", "DriftLogger")
NICENESS = 15


def shadow_apps() -> set[str]:
    from ray import serve

    return {name for name in serve.status().applications if name.startswith(SHADOW_APP_PREFIX)}


def thread_niceness(pid: int) -> list[int]:
    """Of every thread of a process; the field is the 19th, the 17th behind the name in parentheses."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(stat.rpartition(")")[2].split()[16]) for stat in stats]


@pytest.fixture
def deploy(service: Service, ray_connected, monkeypatch):
    monkeypatch.setenv("DERMRAY_HOME", str(service.home))
    # The same code, even if a file was edited since: another release restarts the replicas.
    monkeypatch.setattr("ray_jobs.deploy_service.write_release", lambda *_: Path(service.config["release"]))

    def deploy_with(shadow: str | None, ready_timeout_s: float = 180, **shadowing) -> dict:
        return run(
            DeployServiceConfig(
                bundle=str(service.home / "bundles" / "first"),
                shadow=shadow,
                shadowing={"niceness": NICENESS, "max_pause_s": 1, **shadowing},
                port=ray_connected.http_port,
                ready_timeout_s=ready_timeout_s,
                drift_logger={"attempt_timeout_s": 2},
                scorer={"max_replicas": 1},
            )
        )

    return deploy_with


def test_a_shadow_comes_dies_changes_and_goes_and_no_request_or_replica_of_the_champion_is_lost(service, deploy):
    store = open_log(service.storage).store
    second = served_bundle(service.home / "bundles" / "second", onnx_bias=1.5)
    third = served_bundle(service.home / "bundles" / "third", onnx_bias=-1.5)
    second_version, third_version = (f"bundle-{bundle.sha256[:12]}" for bundle in (second, third))
    before = {name: set(replicas(name)) for name in CHAMPION_NODES}
    traffic = Traffic(service)

    def shadowed(version: str) -> set[str]:
        rows = store.predictions_between(0, 2**62, "shadow")
        return {row["id"].removesuffix(SHADOW_SUFFIX) for row in rows if row["model_version"] == version}

    def wait_for_shadows(version: str, number: int) -> None:
        target = len(shadowed(version)) + number
        wait_for(lambda: len(shadowed(version)) >= target, f"{number} more records of {version}")

    def come_die_change_and_go() -> None:
        assert deploy(second.bundle_uri)["shadow"] == second_version
        wait_for_shadows(second_version, 20)
        ((victim, handle),) = replicas("ShadowModel").items()
        assert max(thread_niceness(victim)) >= NICENESS
        modules = ray.get(handle.__ray_call__.remote(lambda _: sorted(sys.modules)), timeout=30)
        assert [name for name in modules if name.split(".")[0] in FORBIDDEN] == []

        os.kill(victim, signal.SIGKILL)
        traffic.wait_for_answers(20)
        wait_for(lambda: set(replicas("ShadowModel")) - {victim}, "a new shadow")
        wait_for_shadows(second_version, 20)

        assert deploy(third.bundle_uri, fraction=0.5)["shadow"] == third_version
        wait_for_shadows(third_version, 20)
        assert len(shadow_apps() - {SHADOW_APP_PREFIX + second.sha256[:12]}) == 1

        assert deploy(None)["shadow"] is None
        traffic.wait_for_answers(20)

    traffic.during(come_die_change_and_go)
    assert traffic.failed == []
    assert {name: set(replicas(name)) for name in CHAMPION_NODES} == before
    wait_for(lambda: not shadow_apps() and not replicas("ShadowModel"), "the end of the shadows")

    rows = {row["id"]: row for row in store.predictions_between(0, 2**62)}
    assert set(traffic.answered) <= set(rows)
    assert {row["model_version"] for row in rows.values()} == {service.config["model_version"]}
    assert (shadowed(second_version) | shadowed(third_version)) <= set(rows)
    agreement = shadow_agreement(store, service.config["model_version"], second_version, 0)
    assert agreement.pairs >= 40 and agreement.mean_abs_difference > 0 and agreement.rank_correlation > 0.5
    # Nothing is scored behind the back of a service without a shadow.
    found = len(list(store.predictions_between(0, 2**62, "shadow")))
    assert service.predict(77).status_code == 200
    assert service.client.get(f"{service.url}/v1/model").json()["shadow"] is None
    assert len(list(store.predictions_between(0, 2**62, "shadow"))) == found
    store.close()


def test_a_shadow_that_does_not_start_is_taken_away_and_the_service_untouched(service, deploy):
    bundle = served_bundle(service.home / "bundles" / "no_room", onnx_bias=0.5)
    before = {name: set(replicas(name)) for name in CHAMPION_NODES}
    with pytest.raises(ValueError, match=r"the shadow was not ready in 8 s; it is DEPLOYING"):
        deploy(bundle.bundle_uri, ready_timeout_s=8, num_cpus=1000)
    wait_for(lambda: not shadow_apps(), "the end of the shadow")
    assert service.predict(78).status_code == 200
    assert service.client.get(f"{service.url}/v1/model").json()["shadow"] is None
    assert {name: set(replicas(name)) for name in CHAMPION_NODES} == before
