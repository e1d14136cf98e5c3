"""The real graph behind real HTTP on a real cluster, deployed by a submitted job that has ended since."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import ray

from local.cluster import LocalCluster
from local.jobs import run_job_on
from ray_jobs.deploy_service import DeployServiceConfig, run
from serve.drift_logger import open_log
from serve.settings import StorageSettings
from store.alarm_deliveries import Subscription, claim_delivery
from store.tables import now_us
from tests.bundle_factory import lesion_image, served_bundle
from tests.monitoring_files import metric_names

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

METADATA = {"age_approx": 60, "sex": "female"}
FORBIDDEN = ("torch", "mlflow", "evidently", "training", "data_pipelines", "ray_jobs", "sklearn", "matplotlib")


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 90.0) -> object:
    """The first true value of the condition."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s:g} s"
        time.sleep(0.1)
    return value


@dataclass
class Service:
    """The deployed service and its places."""

    url: str
    home: Path
    config: dict
    storage: StorageSettings
    client: httpx.Client

    def predict(self, seed: int = 0, **headers: str) -> httpx.Response:
        return self.client.post(
            f"{self.url}/v1/predict",
            files={"image": ("lesion.jpg", lesion_image(seed))},
            data={"metadata": json.dumps(METADATA), "patient_id": f"patient {seed}"},
            headers=headers,
        )

    def ready(self) -> bool:
        try:
            response = self.client.get(f"{self.url}/readyz")
        except httpx.HTTPError:
            return False
        return response.status_code == 200 and set(response.json()["checks"].values()) == {"ok"}

    def stored_ids(self) -> list[str]:
        return [row["id"] for row in open_log(self.storage).store.predictions_between(0, 2**62)]

    def spooled(self) -> int:
        return open_log(self.storage).spool.pending()


@contextmanager
def deployed_service(cluster: LocalCluster, home: Path, store_url: str | None = None) -> Iterator[Service]:
    """A service on the cluster until the block ends, its data below `home` but for a store elsewhere."""
    home.mkdir()
    store_url = store_url or f"sqlite:///{home}/store.db"
    bundle = served_bundle(home / "bundles" / "first")
    arguments = ["--bundle", bundle.bundle_uri, "--port", str(cluster.http_port), "--store-url", store_url]
    arguments += ["--drift-logger.attempt-timeout-s", "2", "--scorer.max-replicas", "1"]
    result = run_job_on(cluster.client_environment(), home, "deploy_service", arguments, f"deploy-{time.time_ns()}")
    storage = StorageSettings(
        store_url=store_url,
        images_url=str(home / "images"),
        spool_dir=str(home / "spool"),
        patient_key_file=str(home / "secrets" / "patient_hmac.key"),
    )
    # trust_env: loopback is not reached through a proxy, whatever http_proxy says.
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield Service(result["url"], home, result, storage, client)
    from ray import serve

    serve.shutdown()


@pytest.fixture(scope="module")
def service(ray_connected, tmp_path_factory) -> Iterator[Service]:
    with deployed_service(ray_connected, tmp_path_factory.mktemp("served") / "home") as service:
        yield service


def replicas(deployment: str) -> dict[int, ray.actor.ActorHandle]:
    """Live replicas of a deployment by process id."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == "serve" and f"#{deployment}#" in actor["name"]:
            try:
                handle = ray.get_actor(actor["name"], namespace="serve")
                found[ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=20)] = handle
            except (ValueError, ray.exceptions.RayError):
                continue  # it died meanwhile
    return found


@dataclass
class Traffic:
    """Clients that send one request after the other until told to stop."""

    service: Service
    answered: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def _client(self, number: int) -> None:
        seed = 0
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self.stop.is_set():
                seed += 1
                try:
                    response = client.post(
                        f"{self.service.url}/v1/predict", files={"image": ("x", lesion_image(1000 * number + seed))}
                    )
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                    continue
                if response.status_code == 200:
                    self.answered.append(response.json()["prediction_id"])
                else:
                    self.failed.append(f"{response.status_code} {response.text}")

    def during(self, action: Callable[[], None]) -> None:
        """Sends requests with 6 clients before, while and after `action` runs."""
        with ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(self._client, number) for number in range(6)]
            try:
                self.wait_for_answers(20)
                action()
                self.wait_for_answers(40)
            finally:
                self.stop.set()
            for client in clients:
                client.result(timeout=90)

    def wait_for_answers(self, number: int) -> None:
        target = len(self.answered) + number
        wait_for(lambda: len(self.answered) >= target, f"{number} more answers (failed: {self.failed[-3:]})")


def test_the_deploying_job_has_ended_and_the_service_answers(service):
    assert service.config["model_version"].startswith("bundle-")
    assert list((service.home / "releases").glob("*.zip"))
    response = service.predict()
    assert response.status_code == 200
    assert response.json()["prediction_id"] in service.stored_ids()
    assert service.client.get(f"{service.url}/docs").status_code == 200
    card = service.client.get(f"{service.url}/v1/model").json()
    assert card["digest"] == service.config["digest"]
    assert (service.home / "secrets" / "patient_hmac.key").stat().st_mode & 0o077 == 0


def test_batches_and_large_pictures_pass_between_the_nodes(service):
    """One request of 8 MB: over Ray's limit for inlined arguments and over gRPC's own for messages."""
    images = [lesion_image(seed, size=600, suffix=".png") for seed in range(12)]
    response = service.client.post(
        f"{service.url}/v1/predict/batch",
        files=[("images", ("x.png", image)) for image in images] + [("images", ("x.txt", b"text"))],
        data={"metadata": json.dumps([METADATA] * 6 + [None] * 7)},
    )
    assert response.status_code == 200
    answers = response.json()
    assert [answer.get("context") for answer in answers] == ["none"] * 6 + ["image_only"] * 6 + [None]
    assert answers[12]["error"] == "unsupported_media_type"
    assert {answer["prediction_id"] for answer in answers[:12]} <= set(service.stored_ids())
    assert service.ready(), "the log took the way through the spool"


def test_a_repeated_key_is_answered_once(service):
    answers = [service.predict(5, **{"Idempotency-Key": "visit 1".replace(" ", "-")}).json() for _ in range(3)]
    assert len({answer["prediction_id"] for answer in answers}) == 1
    assert service.stored_ids().count(answers[0]["prediction_id"]) == 1
    assert len({answer["risk"] for answer in answers}) == 1


def test_bad_input_is_a_4xx_over_real_http(service):
    post, url = service.client.post, f"{service.url}/v1/predict"
    assert post(url, files={"image": ("x", b"text")}).status_code == 415
    assert post(url, files={"image": ("x", lesion_image())}, data={"metadata": "{"}).status_code == 422
    oversize = post(url, files={"image": ("x", bytes(30 * 2**20))})
    assert oversize.status_code == 413 and oversize.json()["error"] == "too_large"

    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(30):
            yield bytes(2**20)

    chunked = post(url, content=chunks(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert chunked.status_code == 413


def test_a_picture_is_analysed_on_the_page(service):
    """Through the door ahead of Serve and the nodes behind it, as a browser without scripts does it."""
    client, url = service.client, service.url
    page = client.get(f"{url}/")
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]+)"', page.text))
    files = {"images": ("lesion.jpg", lesion_image(4711), "image/jpeg")}
    foreign = client.post(f"{url}/", data=fields | {"csrf_token": "x"}, files=files)
    assert foreign.status_code == 403 and foreign.headers["content-type"].startswith("text/html")
    answer = client.post(f"{url}/", data=fields, files=files)
    assert answer.status_code == 200 and "Next step" in answer.text
    (prediction_id,) = set(re.findall(r"/results/(\w{32})/picture.jpg", answer.text))
    assert client.get(f"{url}/v1/predictions/{prediction_id}").status_code == 200
    for name in ("picture.jpg", "evidence.jpg"):
        assert client.get(f"{url}/results/{prediction_id}/{name}").content.startswith(b"\xff\xd8\xff")
    again = client.get(f"{url}/results/{fields['key']}", params={"n": 1})
    assert prediction_id in again.text


def test_replicas_carry_the_code_of_the_release_and_nothing_of_training(service):
    for deployment in ("Ingress", "ImageScorer", "MetadataFusion", "DriftLogger"):
        (handle,) = replicas(deployment).values()
        modules, origin, home = ray.get(
            handle.__ray_call__.remote(
                lambda _: (sorted(sys.modules), sys.modules["serve.settings"].__file__, os.environ["DERMRAY_HOME"])
            ),
            timeout=30,
        )
        assert [name for name in modules if name.split(".")[0] in FORBIDDEN] == [], deployment
        assert "working_dir_files" in origin, f"{deployment} runs {origin}, not the release"
        assert home == str(service.home)


def scraped(service: Service) -> str:
    """What Prometheus scrapes from the node."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    return service.client.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text


def exported(service: Service) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and values by name, of the service's own figures."""
    text = scraped(service)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in re.findall(r"^(ray_dermray_\w+)(?:\{(.*)\})? (\S+)", text, re.MULTILINE):
        found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def lines_with(text: str) -> dict[str, list[str]]:
    """Lines of the replicas' log files with this text, by deployment."""
    found: dict[str, list[str]] = {}
    for file in (Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve").glob("replica_*.log"):
        deployment = file.name.split("_")[2]
        found.setdefault(deployment, []).extend(line for line in file.read_text().splitlines() if text in line)
    return {deployment: lines for deployment, lines in found.items() if lines}


def test_the_nodes_tell_prometheus_what_they_do(service):
    def count(name: str, **labels: str) -> float:
        rows = exported(service).get(name, [])
        return sum(value for row, value in rows if labels.items() <= row.items())

    predictions, stages = "ray_dermray_predictions_total", "ray_dermray_stage_seconds"
    answers = [service.predict(seed).json() for seed in range(300, 306)]
    assert service.client.post(f"{service.url}/v1/predict", files={"image": ("x", b"text")}).status_code == 415
    # No replica has died so far: every stored prediction was counted. Services before this one had other models.
    stored, version = len(service.stored_ids()), service.config["model_version"]
    wait_for(lambda: count(predictions, model_version=version) >= stored, f"the count of {stored} predictions")
    assert count(predictions, model_version=version) == stored and count(predictions, route="/v1/predict") >= 6
    assert {answer["band"] for answer in answers} <= {row["band"] for row, _ in exported(service)[predictions]}
    wait_for(
        lambda: count(f"{stages}_count", route="/v1/predict", stage="total") >= 6, "the timings of six predictions"
    )
    seconds, number = count(f"{stages}_sum", stage="total"), count(f"{stages}_count", stage="total")
    assert 0.001 < seconds / number < 10
    assert count(f"{stages}_bucket", stage="total", le="+Inf") == number
    problems = "ray_dermray_problems_total"
    wait_for(lambda: count(problems, route="/v1/predict", status="415") >= 1, "the refused upload")
    # Of the other nodes, each from its own process.
    wait_for(lambda: count("ray_dermray_scorer_busy_seconds_total") > 0, "the network's time")
    wait_for(lambda: count("ray_dermray_log_commit_rows_sum") >= 6, "the rows of the log")
    wait_for(lambda: "ray_dermray_submissions_pending" in exported(service), "the queue of submissions")
    now = exported(service)
    held = {(row["deployment"], row["model_version"]) for row, value in now["ray_dermray_model_info"] if value == 1}
    assert held >= {(node, version) for node in ("Ingress", "ImageScorer", "MetadataFusion")}
    assert {value for _, value in now["ray_dermray_log_spooling"]} == {0}
    assert all(row["replica"] for row, _ in now["ray_dermray_admission_inside"])


# Told once they have happened: a lesion without a risk, a refusal at the door.
NOT_ALWAYS = {"ray_dermray_abstentions_total", "ray_dermray_admission_refusals_total"}


def test_prometheus_finds_every_figure_that_the_rules_and_the_dashboard_ask_for(service):
    store = open_log(service.storage).store
    alarm = {"dedupe_key": "watched", "kind": "drift", "severity": "warning", "message": "m", "detail": {}}
    store.raise_alarm(alarm)
    claim_delivery(store, Subscription("watched"), 3_600_000_000, 9, 3_600_000_000)
    statistics = {"features": [{"distance": 0.1, "threshold": 0.2}], "embedding": {"auc": 0.5}}
    figures = dict.fromkeys(("auc", "pauc", "sensitivity", "specificity"), {"value": 0.9, "low": 0.8, "high": 0.95})
    statistics["quality"] = {"trailing": {"contexts": {"none": {**figures, "corrected": None}}}}
    window = {"window_start": now_us() - 1, "window_end": now_us(), "model_version": "watched", "reference": "r"}
    verdict = {"status": "ok", "alarm": False, "drifted": [], "statistics": statistics}
    counts = {"label_watermark": 0, "num_rows": 9, "num_groups": 9, "input_digest": "d", "report": None}
    store.upsert_drift_report({**window, **verdict, **counts})
    assert service.predict(320).status_code == 200
    assert service.client.post(f"{service.url}/v1/predict", files={"image": ("x", b"text")}).status_code == 415
    asked = metric_names() - NOT_ALWAYS
    assert len(asked) > 30

    def missing() -> set[str]:
        return asked - set(re.findall(r"^(ray_\w+)", scraped(service), re.MULTILINE))

    # The store is read every 30 s, and Ray exports every 10.
    deadline = time.monotonic() + 90
    while missing() and time.monotonic() < deadline:
        time.sleep(1)
    assert missing() == set()
    (row,) = [row for row, _ in exported(service)["ray_dermray_alarms_unacknowledged"] if row["kind"] == "drift"]
    assert row["severity"] == "warning"


def test_a_request_is_found_by_its_id_in_the_logs_of_the_nodes_that_it_went_through(service):
    request_id = f"look-for-{time.time_ns()}"
    answer = service.predict(310, **{"X-Request-ID": request_id})
    assert answer.status_code == 200 and answer.headers.get_list("x-request-id") == [request_id]
    # Serve's logger holds lines back; the service writes them out once a second.
    found = wait_for(lambda: lines_with(request_id), "a line of the request", timeout_s=10)
    assert "POST /v1/predict 200" in found["Ingress"][0]
    # Serve would answer 500 to this one.
    odd = service.client.get(f"{service.url}/healthz", headers={"X-Request-ID": b"\xff"})
    assert odd.status_code == 200 and len(odd.headers["x-request-id"]) == 32

    # An inner node that fails names the requests of the call.
    (scorer,) = replicas("ImageScorer").values()
    failing = f"failing-{time.time_ns()}"

    def break_once(replica) -> None:
        logic = replica._replica_impl._user_callable_wrapper._callable._slot.model
        whole = logic.score

        def fail(images):
            logic.score = whole
            raise RuntimeError("the network is broken, once")

        logic.score = fail

    ray.get(scorer.__ray_call__.remote(break_once), timeout=20)
    assert service.predict(311, **{"X-Request-ID": failing}).status_code == 500
    lines = lines_with(failing)
    assert any(f"[requests {failing}] score of 1 failed" in line for line in lines["ImageScorer"])
    assert service.predict(312).status_code == 200


@pytest.mark.parametrize("deployment", ["ImageScorer", "MetadataFusion", "DriftLogger", "Ingress"])
def test_a_killed_replica_loses_no_answered_prediction(service, deployment):
    before = set(service.stored_ids())
    (victim,) = replicas(deployment)
    traffic = Traffic(service)

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: set(replicas(deployment)) - {victim}, f"a new {deployment}")
        wait_for(service.ready, "readiness")

    traffic.during(kill)
    wait_for(lambda: service.ready() and service.spooled() == 0, "the replay of the spool")
    stored = service.stored_ids()
    assert set(traffic.answered) <= set(stored)
    assert len(stored) == len(set(stored))
    assert len(set(traffic.answered)) == len(traffic.answered) >= 60
    # Requests of this test that were cut off may be stored too, but nothing else.
    assert len(set(stored) - before) <= len(traffic.answered) + len(traffic.failed) + 6
    if deployment != "Ingress":
        # Whoever was connected to a dead ingress sees its connection break; no one else may notice anything.
        assert traffic.failed == []


def versions_of_batches(service: Service, stop: threading.Event) -> list[set[str]]:
    """The model versions within each answer to a batch, until told to stop."""
    found = []
    images = [("images", ("x", lesion_image(seed))) for seed in range(24)]
    with httpx.Client(timeout=60, trust_env=False) as client:
        while not stop.is_set():
            response = client.post(f"{service.url}/v1/predict/batch", files=images)
            assert response.status_code == 200, response.text
            found.append({answer["model_version"] for answer in response.json()})
    return found


def test_a_new_model_takes_over_under_load_and_the_old_one_comes_back(service, ray_connected, monkeypatch):
    monkeypatch.setenv("DERMRAY_HOME", str(service.home))
    # The same code, even if a file was edited since: another release restarts the replicas.
    monkeypatch.setattr("ray_jobs.deploy_service.write_release", lambda *_: Path(service.config["release"]))
    second = served_bundle(service.home / "bundles" / "second", onnx_bias=1.5)
    scorers = set(replicas("ImageScorer"))

    def deploy(bundle: str) -> None:
        config = DeployServiceConfig(
            bundle=bundle,
            port=ray_connected.http_port,
            drift_logger={"attempt_timeout_s": 2},
            scorer={"max_replicas": 1},
        )
        run(config)

    def swap_and_roll_back() -> None:
        deploy(second.bundle_uri)
        traffic.wait_for_answers(10)
        deploy(str(service.home / "bundles" / "first"))

    traffic, stop = Traffic(service), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(versions_of_batches, service, stop)
        try:
            traffic.during(swap_and_roll_back)
        finally:
            stop.set()
        batch_versions = batches.result(timeout=90)
    assert traffic.failed == []
    assert set(replicas("ImageScorer")) == scorers
    assert batch_versions and all(len(versions) == 1 for versions in batch_versions), "an answer of two models"
    wait_for(lambda: service.spooled() == 0, "the replay of the spool")
    rows = {row["id"]: row for row in open_log(service.storage).store.predictions_between(0, 2**62)}
    versions = [rows[prediction]["model_version"] for prediction in traffic.answered]
    assert set(versions) == {service.config["model_version"], f"bundle-{second.sha256[:12]}"}
    assert versions[-1] == service.config["model_version"]


def test_another_port_than_the_running_serve_is_refused(service, ray_connected, monkeypatch):
    monkeypatch.setenv("DERMRAY_HOME", str(service.home))
    bundle = str(service.home / "bundles" / "first")
    with pytest.raises(ValueError, match=f"listens on 127.0.0.1:{ray_connected.http_port} already"):
        run(DeployServiceConfig(bundle=bundle, port=ray_connected.http_port + 1))
