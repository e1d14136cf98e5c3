"""Deploys whose process is killed at each stage, on a real cluster under traffic, and deployed again.

The service answers all the while, each answer of one model, and ends as after an unbroken deploy.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from ray_jobs import deploy_service
from ray_jobs.deploy_service import DeployServiceConfig, resolve_model, resolve_shadow, run, serve_settings
from ray_jobs.job import parse_config
from ray_jobs.model_swap import MODEL_NODES, Deployed, running_service
from serve.drift_logger import open_log
from store.synced_files import target_of
from tests.bundle_factory import lesion_image, served_bundle
from tests.house import REPO_ROOT
from tests.test_ray_jobs_deploy_service import engine_set
from tests.test_serve_app import METADATA, Service, replicas, service, wait_for

__all__ = ["service"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

SEEDS = range(4)
RETRY_S = 30.0
FLAGS = ["--drift-logger.attempt-timeout-s", "2", "--scorer.max-replicas", "1"]


@dataclass
class World:
    """A service, two models that it may serve, and what each says to the same pictures."""

    service: Service
    port: int
    bundles: dict[str, str]  # by version
    risks: dict[str, list[float]]  # of the pictures of SEEDS, by version

    def flags(self, bundle: str, *more: str) -> list[str]:
        """As `deployed_service` has it: other settings restart the replicas."""
        storage = ["--store-url", self.service.storage.store_url]
        return ["--bundle", bundle, "--port", str(self.port), *storage, *FLAGS, *more]

    def other(self) -> str:
        """The bundle that is not served now."""
        now = self.service.client.get(f"{self.service.url}/v1/model").json()["model_version"]
        (bundle,) = [bundle for version, bundle in self.bundles.items() if version != now]
        return bundle


def config_of(flags: list[str]) -> DeployServiceConfig:
    return parse_config(DeployServiceConfig, flags, REPO_ROOT / "configs" / "deploy_service.yaml")


def risks_of(service: Service) -> list[float]:
    answers = [service.predict(seed) for seed in SEEDS]
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json()["risk"] for answer in answers]


@pytest.fixture(scope="module")
def world(service, ray_connected) -> World:
    second = served_bundle(service.home / "bundles" / "second", onnx_bias=1.5)
    first = service.config["model_version"]
    bundles = {first: str(service.home / "bundles" / "first"), f"bundle-{second.sha256[:12]}": second.bundle_uri}
    world = World(service, ray_connected.http_port, bundles, {first: risks_of(service)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERMRAY_HOME", str(service.home))
        version = run(config_of(world.flags(second.bundle_uri)))["model_version"]
    world.risks[version] = risks_of(service)
    assert all(abs(one - two) > 0.001 for one, two in zip(*world.risks.values(), strict=True)), world.risks
    return world


@pytest.fixture(autouse=True)
def at_home(service, dermray_home, monkeypatch):
    monkeypatch.setenv("DERMRAY_HOME", str(service.home))


@dataclass
class Traffic:
    """Two clients, one of single lesions and one of batches, that send again what was answered with 503."""

    url: str
    # Version, seed of the picture and risk, by prediction id.
    answered: dict[str, tuple[str, int, float]] = field(default_factory=dict)
    mixed: list[Any] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def _answer(self, send: Callable[[], httpx.Response]) -> Any:
        """The answer to a request that is sent again while it is told to come later; None where there is none."""
        told = []

        def answer() -> httpx.Response | None:
            response = send()
            told.append(f"{response.status_code} {response.text[:200]}")
            assert response.status_code in (200, 503), told[-1]
            return response if response.status_code == 200 else None

        try:
            return wait_for(answer, f"an answer (told {told[-1:]})", RETRY_S).json()
        except (AssertionError, httpx.HTTPError) as error:
            self.failed.append(repr(error))
            return None

    def _single(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self.stop.wait(0.05):
                for seed in SEEDS:
                    form = {"files": {"image": ("x", lesion_image(seed))}, "data": {"metadata": json.dumps(METADATA)}}
                    found = self._answer(lambda form=form: client.post(f"{self.url}/v1/predict", **form))
                    if found is not None:
                        self._note([found], [seed])

    def _batches(self) -> None:
        form = {
            "files": [("images", ("x", lesion_image(seed))) for seed in SEEDS],
            "data": {"metadata": json.dumps([METADATA] * len(SEEDS))},
        }
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self.stop.wait(0.05):
                found = self._answer(lambda: client.post(f"{self.url}/v1/predict/batch", **form))
                if found is not None:
                    self._note(found, SEEDS)

    def _note(self, answers: list[dict[str, Any]], seeds: Sequence[int]) -> None:
        if len({answer["model_version"] for answer in answers}) != 1:
            self.mixed.append(answers)
        for answer, seed in zip(answers, seeds, strict=True):
            self.answered[answer["prediction_id"]] = answer["model_version"], seed, answer["risk"]

    def wait_for_answers(self, number: int) -> None:
        target = len(self.answered) + number
        wait_for(lambda: self.failed or len(self.answered) >= target, f"{number} more answers")
        assert self.failed == []


@contextmanager
def traffic_of(world: World) -> Iterator[Traffic]:
    """Traffic until the block ends; then all that was answered is looked at, and looked for in the store."""
    traffic = Traffic(world.service.url)
    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(traffic._single), pool.submit(traffic._batches)]
        try:
            traffic.wait_for_answers(10)
            yield traffic
            traffic.wait_for_answers(10)
        finally:
            traffic.stop.set()
        for client in clients:
            client.result(timeout=90)
    assert traffic.failed == [] and traffic.mixed == []
    for version, seed, risk in traffic.answered.values():
        assert risk == pytest.approx(world.risks[version][seed], abs=1e-5), "not of the model that it names"
    wait_for(lambda: world.service.spooled() == 0, "the replay of the spool")
    rows = list(open_log(world.service.storage).store.predictions_between(0, 2**62))
    stored = {row["id"]: row["model_version"] for row in rows}
    assert len(stored) == len(rows)
    assert {name: stored.get(name) for name in traffic.answered} == {
        name: version for name, (version, _, _) in traffic.answered.items()
    }


def slots(node: str) -> list[tuple[dict[str, Any], bool]]:
    """What each replica of a node holds, and whether it holds another model beside that."""

    def look(replica: Any) -> tuple[dict[str, Any], bool]:
        slot = replica._replica_impl._user_callable_wrapper._callable._slot
        return slot.state(), slot._prepared is not None

    return [ray.get(replica.__ray_call__.remote(look), timeout=20) for replica in replicas(node).values()]


def state(service: Service) -> dict[str, Any]:
    """All that a deploy leaves: what the service is told, what its nodes hold, what Serve runs, what is on disk."""
    from ray import serve

    told, applications = running_service(), serve.status().applications
    running = {
        name: {node: dict(deployment.replica_states) for node, deployment in application.deployments.items()}
        for name, application in applications.items()
        # A shadow that goes takes its time.
        if application.status != "DELETING"
    }
    card = service.client.get(f"{service.url}/v1/model").json()
    ours = [path for path in service.home.rglob("*") if not path.is_relative_to(service.home / "spool")]
    ours = [path for path in ours if not path.is_relative_to(service.home / "images")]
    return {
        "told": None if told is None else told.told(),
        "held": {node: slots(node) for node in MODEL_NODES},
        "running": running,
        "ready": service.ready(),
        "card": (card["model_version"], card["digest"], card["limits"], (card["shadow"] or {}).get("digest")),
        "releases": sorted(path.name for path in (service.home / "releases").iterdir()),
        "secrets": {path.name: path.read_bytes() for path in (service.home / "secrets").iterdir()},
        "left over": [path.name for path in ours if target_of(path.name) or path.name.endswith(".partial")],
    }


def expected(service: Service, flags: list[str]) -> dict[str, Any]:
    """What an unbroken deploy with these flags leaves; see `test_an_unbroken_deploy`."""
    config, release = config_of(flags), Path(service.config["release"])
    model = resolve_model(config)
    shadow = resolve_shadow(config, model)
    running = {"dermray": dict.fromkeys((*MODEL_NODES, "DriftLogger"), {"RUNNING": 1})}
    if shadow is not None:
        running[shadow.app_name] = {"ShadowModel": {"RUNNING": 1}}
    return {
        "told": Deployed(serve_settings(config, release), model, shadow).told(),
        "held": dict.fromkeys(MODEL_NODES, [({"model": model.model_dump(), "refused": None}, False)]),
        "running": running,
        "ready": True,
        "card": (
            model.version,
            model.sha256,
            config.limits.model_dump(),
            None if shadow is None else shadow.model.sha256,
        ),
        "releases": [release.name],
        "secrets": {"patient_hmac.key": Path(config.patient_key_file).read_bytes()},
        "left over": [],
    }


def check_state(service: Service, flags: list[str]) -> None:
    """Waits for what goes on its own (a replica that was replaced and ends), then compares."""
    wanted = expected(service, flags)
    found: list[Any] = []

    def reached() -> bool:
        found.append(state(service))
        return found[-1] == wanted

    try:
        wait_for(reached, "the state of an unbroken deploy", 40)
    except AssertionError:
        assert found[-1] == wanted


def driver(flags: list[str], when: str, place: str, number: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.killed_deploy", when, place, str(number), *flags]
    return subprocess.Popen(command, cwd=REPO_ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def killed(process: subprocess.Popen[str]) -> None:
    """Returns once the process was killed."""
    output = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output


def pids() -> dict[str, set[int]]:
    return {node: set(replicas(node)) for node in MODEL_NODES}


def test_an_unbroken_deploy(world):
    """There and back; run twice is run once."""
    service, before = world.service, pids()
    for _ in world.bundles:
        bundle = world.other()
        flags = world.flags(bundle)
        for _ in range(2):
            assert run(config_of(flags))["release"] == service.config["release"]
            check_state(service, flags)
    assert pids() == before


SWAPS = [
    pytest.param("after", "ray_jobs.deploy_service:check_room", 1, id="room checked"),
    pytest.param("after", "ray_jobs.model_swap:_prepare_node", 1, id="loaded on one node"),
    pytest.param("before", "ray_jobs.service_rollout:Rollout._deploy", 1, id="loaded on all, store upgraded"),
    pytest.param("after", "ray.serve.api:run_many", 1, id="the switch is ordered"),
    pytest.param("before", "ray_jobs.service_rollout:_end_shadows", 1, id="switched"),
    pytest.param("after", "ray_jobs.deploy_service:run", 1, id="done, and not told"),
]


@pytest.mark.parametrize(("when", "place", "number"), SWAPS)
def test_a_new_model_whose_deploy_is_killed(world, when, place, number):
    before, flags = pids(), world.flags(world.other())
    with traffic_of(world) as traffic:
        killed(driver(flags, when, place, number))
        traffic.wait_for_answers(10)
        run(config_of(flags))
    check_state(world.service, flags)
    assert pids() == before


@contextmanager
def held_scorer(method: str, folder: Path) -> Iterator[Callable[[], object]]:
    """Has the scorer's slot wait in its next `_load`, or `use`, until the block ends; gives what waits until it is
    there."""
    waits, go = folder / "waits", folder / "go"
    (scorer,) = replicas("ImageScorer").values()

    def hold(replica: Any, blocking: bool) -> None:
        import asyncio
        import time

        slot = replica._replica_impl._user_callable_wrapper._callable._slot
        whole = getattr(slot, method)

        def load(reference):
            waits.touch()
            while not go.exists():
                time.sleep(0.02)
            slot._load = whole
            return whole(reference)

        async def use(config):
            waits.touch()
            while not go.exists():
                await asyncio.sleep(0.02)
            del slot.use
            return await whole(config)

        setattr(slot, method, load if blocking else use)

    ray.get(scorer.__ray_call__.remote(hold, method == "_load"), timeout=20)
    try:
        yield lambda: wait_for(waits.exists, f"the scorer's {method}")
    finally:
        go.touch()


def test_a_deploy_that_is_killed_while_a_node_loads_the_model(world, tmp_path):
    before, flags = pids(), world.flags(world.other())
    with traffic_of(world) as traffic:
        with held_scorer("_load", tmp_path) as wait_until_held:
            process = driver(flags, "before", "ray_jobs.service_rollout:Rollout._deploy")
            wait_until_held()
            process.kill()
            killed(process)
            traffic.wait_for_answers(10)
        run(config_of(flags))
    check_state(world.service, flags)
    assert pids() == before


def test_a_deploy_that_is_killed_when_some_nodes_have_switched(world, tmp_path):
    """The next one waits for the last of them, and does not take the service for switched."""
    before, flags = pids(), world.flags(world.other())
    wanted = expected(world.service, flags)["held"]["Ingress"][0][0]["model"]

    def held(node: str) -> dict[str, Any]:
        ((found, _),) = slots(node)
        return found["model"]

    with traffic_of(world), ThreadPoolExecutor(1) as pool:
        with held_scorer("use", tmp_path) as wait_until_held:
            killed(driver(flags, "after", "ray.serve.api:run_many"))
            wait_until_held()
            wait_for(lambda: held("Ingress") == held("MetadataFusion") == wanted, "the switch of the others")
            assert held("ImageScorer") != wanted
            again = pool.submit(run, config_of(flags))
            with pytest.raises(TimeoutError):
                again.result(timeout=3)
        assert again.result(timeout=60)["model_version"] == wanted["version"]
    check_state(world.service, flags)
    assert pids() == before


@pytest.mark.parametrize(
    ("when", "place", "pixels"),
    [
        pytest.param("after", "ray.serve.api:run_many", 1_000_000, id="the replacement is ordered"),
        pytest.param("before", "ray_jobs.service_rollout:all_replicas_hold", None, id="new replicas run"),
    ],
)
def test_other_settings_and_another_model_whose_deploy_is_killed(world, when, place, pixels):
    """All replicas are replaced, by the cluster alone; the last of these tests puts the settings back."""
    before = pids()
    flags = world.flags(world.other(), *([] if pixels is None else ["--limits.max-pixels", str(pixels)]))
    with traffic_of(world) as traffic:
        killed(driver(flags, when, place))
        traffic.wait_for_answers(10)
        run(config_of(flags))
    check_state(world.service, flags)
    after = pids()
    assert not any(after[node] & before[node] for node in MODEL_NODES)


@pytest.mark.parametrize(
    ("when", "place", "shadowed"),
    [
        pytest.param("after", "serve.shadow_model:run_shadow", True, id="a shadow is ordered"),
        pytest.param("before", "serve.shadow_model:delete_shadow", False, id="a shadow is about to end"),
    ],
)
def test_a_shadow_that_comes_or_goes_with_a_killed_deploy(world, when, place, shadowed):
    served, before = world.other(), pids()
    (shadow,) = set(world.bundles.values()) - {served}
    if shadowed:
        flags = world.flags(served, "--shadow", shadow, "--shadowing.num-cpus", "0.1")
    else:
        with_shadow = world.flags(shadow, "--shadow", served, "--shadowing.num-cpus", "0.1")
        if running_service().shadow is None:
            run(config_of(with_shadow))
        flags = world.flags(served)
    with traffic_of(world) as traffic:
        killed(driver(flags, when, place))
        traffic.wait_for_answers(10)
        run(config_of(flags))
    check_state(world.service, flags)
    assert pids() == before


@pytest.fixture
def engineless(world) -> str:
    """A bundle that the scorer alone refuses."""
    reference = served_bundle(world.service.home / "bundles" / "engineless", onnx_bias=2.5)
    broken = engine_set(reference.sha256, "x", threads=1)
    broken.candidates[0].candidate.choice = {"engine": "abacus"}
    broken.save(world.service.home / "engine_sets")
    return reference.bundle_uri


def test_a_model_that_is_refused_at_the_switch_by_a_deploy_that_is_killed_before_it_puts_the_old_one_back(
    world, engineless
):
    """The next deploy of that model is refused as ever, and the service answers as before both."""
    served = world.service.client.get(f"{world.service.url}/v1/model").json()["model_version"]
    before, flags = pids(), world.flags(engineless)
    # What would have refused it earlier: it loaded then, and does not any more.
    skipped = ["--without", "ray_jobs.deploy_service:load_once"]
    skipped += ["--without", "ray_jobs.service_rollout:prepare_replicas"]
    with traffic_of(world), pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy_service, "load_once", lambda *_: None)
        killed(driver([*skipped, *flags], "before", "ray_jobs.service_rollout:Rollout._put_back"))
        assert not world.service.ready()
        with pytest.raises(ValueError, match=f"is not served: ImageScorer: .*abacus.*; version {served} goes on$"):
            run(config_of(flags))
    check_state(world.service, world.flags(world.bundles[served]))
    assert pids() == before
