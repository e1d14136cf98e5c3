"""What an operator reads in Prometheus is what happened, under names that the documentation explains."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray.util.metrics
from starlette.testclient import TestClient

from serve.admission import Admission
from serve.drift_logger import DriftLogger, LogEntry
from serve.durable_log import DurableLog
from serve.gauges import watch_admission, watch_log
from serve.image_scorer import ImageScorer, ScoreCall
from serve.ingress import build_api
from serve.metadata_fusion import MetadataFusion
from serve.metrics import (
    ABSTENTIONS,
    ADMISSION_INSIDE,
    ADMISSION_REFUSALS,
    ADMISSION_WAITING,
    ALARMS_UNACKNOWLEDGED,
    LOG_COMMIT_ROWS,
    LOG_COMMIT_SECONDS,
    LOG_SPOOL_PENDING,
    LOG_SPOOLING,
    METRICS,
    MODEL_INFO,
    PREDICTIONS,
    PROBLEMS,
    SCORER_BUSY_SECONDS,
    SCORER_PICTURES,
    STAGE_SECONDS,
    SUBMISSIONS_PENDING,
    ModelInfo,
    NoMetrics,
    RayMetrics,
    replica_metrics,
)
from serve.prediction_service import PredictionService
from serve.sampling import Sampler
from serve.served_model import ServedModel
from serve.settings import AdmissionSettings, DriftLoggerSettings, ScorerSettings
from store.database import StoreUnavailableError
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    backend,
    blank_image,
    lesion_image,
    lesion_rule,
    served_bundle,
)
from tests.figures import Figures
from tests.local_service import LocalService
from tests.test_serve_drift_logger import entry
from tests.tiny_bundle import SIZE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "observability.md"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("metrics") / "bundle", version="7", abstention=lesion_rule())


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


class Observed(LocalService):
    """A service that tells its figures."""

    def __init__(self, reference, nodes, home):
        super().__init__(reference, home, nodes=nodes)
        self.figures = Figures()
        durable = DurableLog(self.sidecar, self.log, DriftLoggerSettings(attempts=1, replay_interval_s=60))
        self.service = PredictionService(self.service.scoring, durable, b"a test's secret", self.figures)
        self.service.use_model(ServedModel.load(reference))
        behind = dataclasses.replace(backend(self.service, self.log), metrics=self.figures)
        self.client = TestClient(build_api(behind), raise_server_exceptions=False)

    def predict(self, image, route="/v1/predict", field="image", **headers):
        return self.client.post(route, files=[(field, ("x", one)) for one in image], headers=headers)


@pytest.fixture
def observed(reference, nodes, dermray_home):
    return Observed(reference, nodes, dermray_home)


def test_an_answer_is_counted_with_the_timings_that_it_tells(observed):
    answer = observed.predict([lesion_image(2000)]).json()
    assert observed.figures.values(PREDICTIONS, "/v1/predict", answer["band"], "7") == [1]
    stages = answer["stage_ms"]
    assert observed.figures.labels(STAGE_SECONDS) == {("/v1/predict", stage) for stage in stages}
    assert {"decode", "score", "fuse", "log", "total"} <= set(stages)
    for stage, milliseconds in stages.items():
        assert observed.figures.values(STAGE_SECONDS, "/v1/predict", stage) == [milliseconds / 1e3]
    assert observed.figures.labels(PROBLEMS) == set()


def test_a_repeated_request_is_no_second_prediction(observed):
    first, second = (observed.predict([lesion_image(2000)], **{"Idempotency-Key": "visit"}).json() for _ in range(2))
    assert first["prediction_id"] == second["prediction_id"]
    assert observed.figures.values(PREDICTIONS, "/v1/predict", first["band"], "7") == [1]
    assert len(observed.figures.values(STAGE_SECONDS, "/v1/predict", "lookup")) == 1


def test_a_batch_counts_every_lesion_and_the_reasons_of_those_without_a_risk(observed):
    answers = observed.predict(
        [lesion_image(2000), blank_image(), blank_image(255), b"text"], "/v1/predict/batch", "images"
    ).json()
    abstained = [answer for answer in answers if answer.get("abstained")]
    assert len(abstained) == 2 and "error" in answers[3]
    figures, route = observed.figures, "/v1/predict/batch"
    assert figures.values(PREDICTIONS, route, "abstained", "7") == [1, 1]
    assert figures.values(PREDICTIONS, route, answers[0]["band"], "7") == [1]
    told = {reason: len(figures.values(ABSTENTIONS, reason, "7")) for reason, _ in figures.labels(ABSTENTIONS)}
    expected: dict[str, int] = {}
    for answer in abstained:
        for reason in answer["reasons"]:
            expected[reason] = expected.get(reason, 0) + 1
    assert told == expected and told
    assert len(figures.values(STAGE_SECONDS, route, "total")) == 1


def test_every_refusal_is_counted_by_route_and_code_and_no_client_makes_up_a_label(observed):
    figures = observed.figures
    assert observed.predict([b"text"]).status_code == 415
    assert observed.client.get("/v1/predictions/no-such-id").status_code == 404
    assert observed.client.get("/v1/predictions/another").status_code == 404
    assert observed.client.get("/nowhere/at/all").status_code == 404
    assert observed.client.delete("/v1/predict").status_code == 405
    assert figures.labels(PROBLEMS) == {
        ("/v1/predict", "415", "unsupported_media_type"),
        ("/v1/predictions/{prediction_id}", "404", "not_found"),
        ("other", "404", "not_found"),
        ("/v1/predict", "405", "method_not_allowed"),
    }
    assert figures.values(PROBLEMS, "/v1/predictions/{prediction_id}", "404", "not_found") == [1, 1]
    assert figures.labels(PREDICTIONS) == set()


def test_a_fault_of_the_service_is_counted_too(observed, monkeypatch):
    async def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(observed.service, "predict", fail)
    assert observed.predict([lesion_image()]).status_code == 500
    assert observed.figures.labels(PROBLEMS) == {("/v1/predict", "500", "internal_error")}


def test_admission_tells_who_is_inside_who_waits_and_how_many_were_refused():
    async def scenario():
        figures = Figures()
        sampler = Sampler(figures)
        settings = AdmissionSettings(max_requests=2, patience_s=30, max_waiting=1)
        admission = Admission(settings, lambda: 0.0, 1)
        watch_admission(sampler, figures, admission)
        for _ in range(2):
            await admission.enter(1)
        waiting = asyncio.create_task(admission.enter(1))
        await asyncio.sleep(0)
        for _ in range(3):
            with pytest.raises(Exception, match="max_waiting"):
                await admission.enter(1)
        await sampler.sample()
        admission.leave(1)
        await waiting
        admission.leave(1)
        await sampler.sample()
        assert figures.values(ADMISSION_INSIDE) == [2, 1]
        assert figures.values(ADMISSION_WAITING) == [1, 0]
        assert figures.values(ADMISSION_REFUSALS) == [3, 0]

    asyncio.run(scenario())


def test_a_service_that_spools_says_so_and_how_much(observed):
    async def scenario():
        figures = Figures()
        sampler = Sampler(figures)
        durable = DurableLog(observed.sidecar, observed.log, DriftLoggerSettings(attempts=1, replay_interval_s=60))
        watch_log(sampler, figures, durable, observed.log)
        await sampler.sample()
        observed.sidecar.down = ConnectionError("away")
        await durable.write(entry(1))
        await sampler.sample()
        assert figures.values(LOG_SPOOLING) == [0, 1]
        assert figures.values(LOG_SPOOL_PENDING) == [0, 1]

    asyncio.run(scenario())


def test_the_scorer_tells_pictures_per_run_and_the_time_that_the_network_ran(reference):
    async def scenario():
        figures = Figures()
        scorer = ImageScorer(ScorerSettings().model_dump(), figures)
        await scorer.reconfigure(reference.model_dump())
        # Without Serve's batching around it, which needs a replica.
        run = ImageScorer._run.__wrapped__
        late, later = time.monotonic() - 1, time.monotonic() + 60

        def call(number, size=SIZE, deadline=later):
            return ScoreCall(np.zeros((number, size, size, 3), np.uint8), deadline)

        # What does not fit the model, or comes too late, is not run.
        answers = await run(scorer, [call(3), call(1, size=SIZE + 1), call(2), call(1, deadline=late)])
        assert [None if answer is None else len(answer.projections) for answer in answers] == [3, None, 2, None]
        await run(scorer, [call(1)])
        await run(scorer, [call(1, deadline=late)])
        assert figures.values(SCORER_PICTURES) == [5, 1]
        busy = figures.values(SCORER_BUSY_SECONDS)
        assert len(busy) == 2 and all(0 < seconds < 5 for seconds in busy)
        assert figures.values(MODEL_INFO, "ImageScorer", "7", reference.sha256[:12]) == [1]

    asyncio.run(scenario())


def test_the_model_of_before_is_told_to_be_gone(reference):
    figures = Figures()
    info = ModelInfo(figures, "Ingress")
    for version, digest in (("7", "a" * 64), ("7", "a" * 64), ("8", "b" * 64), ("7", "a" * 64)):
        info.holds(version, digest)
    assert figures.values(MODEL_INFO, "Ingress", "7", "a" * 12) == [1, 1, 0, 1]
    assert figures.values(MODEL_INFO, "Ingress", "8", "b" * 12) == [1, 0]


def test_the_sidecar_tells_commits_that_worked_and_those_that_did_not(observed, monkeypatch):
    async def scenario():
        figures = Figures()
        places = {
            "store_url": observed.log.store_url,
            "images_url": observed.log.image_files.url,
            "spool_dir": str(observed.log.spool.directory),
            "patient_key_file": "/not/read",
        }
        sidecar = DriftLogger(places, metrics=figures)
        both = entry(1)
        more = LogEntry(both.records + entry(2).records, both.images | entry(2).images)
        assert await sidecar.write([more]) == [None]

        def away(_):
            raise StoreUnavailableError("locked")

        monkeypatch.setattr(sidecar._logic, "commit", away)
        with pytest.raises(StoreUnavailableError):
            await sidecar.write([entry(3)])
        assert len(figures.values(LOG_COMMIT_SECONDS, "ok")) == len(figures.values(LOG_COMMIT_SECONDS, "error")) == 1
        assert figures.values(LOG_COMMIT_ROWS) == [2]

        files = {"image": ("x", lesion_image(2005))}
        assert observed.client.post("/v1/submissions", files=files).status_code == 202
        await sidecar._sampler.sample()
        assert figures.values(SUBMISSIONS_PENDING, "queued")[-1] == 1
        assert figures.values(SUBMISSIONS_PENDING, "running")[-1] == 0
        await sidecar._sampler.stop()

    asyncio.run(scenario())


def test_a_figure_that_cannot_be_read_stops_no_other(caplog):
    async def scenario():
        figures, read = Figures(), []
        sampler = Sampler(figures, interval_s=0.001, log_interval_s=0.001)

        def fail():
            raise OSError("disk")

        on_loop = threading.get_ident()
        sampler.add(fail)
        sampler.add(lambda: read.append(threading.get_ident() == on_loop))
        sampler.add(fail, blocking=True)
        sampler.add(lambda: read.append(threading.get_ident() == on_loop), blocking=True)
        sampler.start()
        sampler.start()
        while figures.flushed < 3:
            await asyncio.sleep(0.001)
        await sampler.stop()
        # One that may block is read off the event loop.
        assert read[:4] == [True, False, True, False]
        told = figures.flushed
        await asyncio.sleep(0.01)
        assert figures.flushed == told, "it goes on after its end"

    asyncio.run(scenario())
    assert "disk" in caplog.text


class Told:
    """Ray's counters and gauges, as this process tells them: values by name and labels."""

    def __init__(self, monkeypatch):
        self.values = {}
        for kind, method in (("Counter", "inc"), ("Gauge", "set")):
            whole = getattr(getattr(ray.util.metrics, kind), method)
            monkeypatch.setattr(getattr(ray.util.metrics, kind), method, self._watched(kind, whole))

    def _watched(self, kind, whole):
        def tell(instrument, value, tags):
            whole(instrument, value, tags)  # refuses what Ray refuses
            key = instrument.info["name"], frozenset(tags.items())
            self.values[key] = value + (self.values.get(key, 0) if kind == "Counter" else 0)

        return tell

    def __call__(self, name, **tags):
        return self.values.get((name, frozenset(tags.items())))


def test_what_is_recorded_reaches_ray_added_up(monkeypatch):
    """Ray refuses wrong names and labels; it needs no cluster for that."""
    told, metrics = Told(monkeypatch), RayMetrics("r1")
    for value in (0.0005, 0.001, 0.004, 0.3, 99):
        metrics.record(STAGE_SECONDS, value, "/v1/predict", "score")
    for _ in range(3):
        metrics.record(PREDICTIONS, 1, "/v1/predict", "low", "7")
    metrics.record(ADMISSION_REFUSALS, 0)
    for value in (5, 4):
        metrics.record(ADMISSION_INSIDE, value)
    assert told.values == {}
    metrics.flush()
    assert told("dermray_predictions", route="/v1/predict", band="low", model_version="7") == 3
    assert told("dermray_admission_inside", replica="r1") == 4
    labels = {"route": "/v1/predict", "stage": "score", "replica": "r1"}

    def buckets():
        bounds = ("0.001", "0.002", "0.005", "0.2", "0.5", "30", "+Inf")
        return [told("dermray_stage_seconds_bucket", **labels, le=bound) for bound in bounds]

    assert buckets() == [2, 2, 3, 3, 4, 4, 5]
    assert told("dermray_stage_seconds_count", **labels) == 5
    assert told("dermray_stage_seconds_sum", **labels) == pytest.approx(99.3055)

    # What stays as it was is told again, or Ray would forget it; what grows, grows.
    told.values.clear()
    metrics.record(STAGE_SECONDS, 0.3, "/v1/predict", "score")
    metrics.record(PREDICTIONS, 1, "/v1/predict", "low", "7")
    metrics.flush()
    assert told("dermray_predictions", route="/v1/predict", band="low", model_version="7") == 1
    assert told("dermray_admission_inside", replica="r1") == 4
    assert buckets() == [2, 2, 3, 3, 5, 5, 6]


def test_ray_takes_every_metric_with_its_labels(monkeypatch):
    told, metrics = Told(monkeypatch), RayMetrics("r1")
    for metric in METRICS:
        metrics.record(metric, 1.5, *metric.labels)
        with pytest.raises(AssertionError):
            metrics.record(metric, 1, *metric.labels, "one too many")
    metrics.flush()
    for metric in METRICS:
        tags = dict(zip(metric.tag_keys, (*metric.labels, "r1"), strict=False))
        name = metric.name if metric.kind != "histogram" else f"{metric.name}_sum"
        assert told(name, **tags) == 1.5, metric.name


def test_a_gauge_that_is_forgotten_is_told_no_more(monkeypatch):
    told, metrics = Told(monkeypatch), RayMetrics("r1")
    for kind in ("drift", "missed_cancer"):
        metrics.record(ALARMS_UNACKNOWLEDGED, 2, kind, "warning")
    metrics.flush()
    assert told("dermray_alarms_unacknowledged", kind="drift", severity="warning") == 2
    metrics.forget(ALARMS_UNACKNOWLEDGED, "drift", "warning")
    metrics.forget(ALARMS_UNACKNOWLEDGED, "never", "told")
    told.values.clear()
    metrics.flush()
    assert told("dermray_alarms_unacknowledged", kind="missed_cancer", severity="warning") == 2
    assert len(told.values) == 1


def test_threads_lose_no_count(monkeypatch):
    told, metrics = Told(monkeypatch), RayMetrics("r1")

    def record():
        for _ in range(2000):
            metrics.record(SCORER_BUSY_SECONDS, 1)
            metrics.record(LOG_COMMIT_ROWS, 2)

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.flush()
    metrics.flush()
    assert (
        told("dermray_scorer_busy_seconds", replica="r1") == told("dermray_log_commit_rows_count", replica="r1") == 6000
    )


def test_outside_of_a_replica_nothing_is_told():
    async def scenario():
        MetadataFusion()
        assert isinstance(replica_metrics(), NoMetrics)

    asyncio.run(scenario())


def test_every_metric_is_documented_and_every_documented_one_exists():
    rows = re.findall(r"^\| `(ray_dermray_\w+)` \| (\w+) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    documented = {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == {(metric.exported_name, metric.kind, metric.tag_keys) for metric in METRICS}
    known = {metric.exported_name for metric in METRICS}
    named = set(re.findall(r"\bray_dermray_\w+", PAGE.read_text()))
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in named} == known
