"""Submissions on the real routes and a real store: nothing accepted is lost, nothing is scored or recorded twice."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from monitoring.prediction_log import patient_hmac
from serve import submission_worker
from serve.access import Caller
from serve.drift_logger import open_log
from serve.durable_log import DurableLog
from serve.errors import ApiError, unavailable
from serve.ingress import build_api
from serve.served_model import ServedModel
from serve.settings import (
    DriftLoggerSettings,
    ModelReference,
    ServeSettings,
    StorageSettings,
    SubmissionSettings,
    UploadLimits,
)
from serve.submission_queue import SubmissionQueue
from serve.submission_worker import SubmissionWorker, prediction_key
from store.submissions import erase_submissions, find_submission
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    LocalSidecar,
    backend,
    lesion_image,
    prediction_service,
    served_bundle,
    storage,
)

LIMITS = UploadLimits(max_image_bytes=100_000, max_pixels=250_000)
# Leases long enough for a busy machine; tests that wait for one to end take a shorter one.
SETTINGS = SubmissionSettings(lease_s=60, backoff_s=0.01, poll_interval_s=0.05, attempts=3)
METADATA = {"age_approx": 60, "sex": "female"}
WAIT_S = 60


class GatedScorer(LocalScorer):
    """Scores only while `gate` is set, one call per picture; counts calls and how many wait at once."""

    def __init__(self, reference: ModelReference):
        super().__init__(reference)
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = self.waiting = self.most_waiting = 0

    async def score(self, images, deadline):
        self.calls += 1
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        return await super().score(images, deadline)


class Replica:
    """One ingress replica: objects of its own on the places that all replicas share."""

    def __init__(self, reference, places, settings=SETTINGS, scorer=None):
        self.scorer = scorer or GatedScorer(reference)
        self.log = open_log(places)
        durable = DurableLog(LocalSidecar(places), self.log, DriftLoggerSettings(attempts=1, attempt_timeout_s=5))
        self.service = prediction_service((self.scorer, LocalFusion(reference)), durable, LIMITS)
        self.service.use_model(ServedModel.load(reference))
        self.worker = SubmissionWorker(self.service, self.log, settings)
        self.queue = SubmissionQueue(self.service, self.log, settings, self.worker.wake)
        self.caller = Caller("clinic", "caller")
        api = build_api(dataclasses.replace(backend(self.service, self.log), submissions=self.queue))

        async def with_caller(scope, receive, send):
            await api({**scope, "dermray.caller": self.caller}, receive, send)

        transport = httpx.ASGITransport(with_caller, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://service")

    async def submit(self, image=None, key=None, **form) -> httpx.Response:
        return await self.client.post(
            "/v1/submissions",
            files={"image": ("lesion.jpg", lesion_image() if image is None else image)},
            data=form,
            headers={} if key is None else {"Idempotency-Key": key},
        )

    async def accepted(self, *arguments, **values) -> str:
        response = await self.submit(*arguments, **values)
        assert response.status_code == 202, response.text
        return response.json()["submission_id"]

    async def status(self, submission_id: str) -> dict:
        response = await self.client.get(f"/v1/submissions/{submission_id}")
        assert response.status_code == 200, response.text
        return response.json()

    async def state(self, submission_id: str, *states: str) -> dict:
        """The submission once it is in one of these states."""
        async with asyncio.timeout(WAIT_S):
            while (found := await self.status(submission_id))["state"] not in states:
                await asyncio.sleep(0.01)
        return found

    def rows(self) -> list[dict]:
        return list(self.log.store.predictions_between(0, 2**62))

    async def crash(self) -> None:
        """Ends the worker's tasks where they are, as a killed process would."""
        tasks = [self.worker._task, *self.worker._scoring]
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("submissions") / "bundle", version="7")


@pytest.fixture
def places(dermray_home):
    return storage(dermray_home)


@contextlib.asynccontextmanager
async def running(reference, places, settings=SETTINGS, started=True):
    replica = Replica(reference, places, settings)
    if started:
        replica.worker.start()
    try:
        yield replica
    finally:
        replica.scorer.gate.set()
        await replica.worker.stop()
        await replica.client.aclose()
        replica.log.store.close()


def problem(response: httpx.Response, status: int, text: str = "") -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"} and text in body["detail"], body


def test_a_submission_is_answered_as_predict_answers_and_recorded_once(reference, places):
    async def story():
        async with running(reference, places) as replica:
            form = {
                "metadata": json.dumps(METADATA),
                "patient_id": "patient 1",
                "institution": "clinic",
                "device": "dermatoscope",
                "acquired_at": "2024-05-01T09:30:00Z",
            }
            response = await replica.submit(**form)
            assert response.status_code == 202
            answer = response.json()
            assert set(answer) == {"submission_id", "state", "status_url"}
            assert response.headers["Location"] == answer["status_url"] == f"/v1/submissions/{answer['submission_id']}"
            done = await replica.state(answer["submission_id"], "done", "failed")
            assert set(done) == {
                "submission_id",
                "state",
                "submitted_at",
                "finished_at",
                "attempts",
                "result",
                "error",
            }
            assert (done["state"], done["attempts"], done["error"]) == ("done", 1, None)
            assert done["submitted_at"] <= done["finished_at"]
            (row,) = replica.rows()
            assert done["result"]["prediction_id"] == row["id"] and done["result"]["risk"] == row["risk"]
            assert row["patient_hmac"] == patient_hmac("patient 1", b"a test's secret")
            assert (row["caller"], row["institution"], row["device"]) == ("clinic", "clinic", "dermatoscope")
            assert row["acquired_at"] == 1714555800_000_000 and row["metadata"] == {"age_approx": 60.0, "sex": "female"}
            files = {"image": ("x", lesion_image())}
            live = (await replica.client.post("/v1/predict", files=files, data=form)).json()
            same = set(live) - {"prediction_id", "stage_ms"}
            assert {name: live[name] for name in same} == {name: done["result"][name] for name in same}

    asyncio.run(story())


def test_202_means_that_row_and_picture_are_on_disk_and_the_patients_id_is_nowhere(reference, places, dermray_home):
    async def story():
        async with running(reference, places, started=False) as replica:
            name = await replica.accepted(patient_id="Jane Doe 1970")
            row = find_submission(replica.log.store, name)
            assert row["state"] == "queued"
            assert row["request"]["patient_hmac"] == patient_hmac("Jane Doe 1970", b"a test's secret")
            stored = replica.log.image_files.get(row["request"]["image_hash"], row["request"]["image_suffix"])
            assert cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR) is not None
            assert replica.log.store.image_suffix(row["request"]["image_hash"]) == ".jpg"

    asyncio.run(story())
    files = [file for file in dermray_home.rglob("*") if file.is_file()]
    assert files and not [file for file in files if b"Jane Doe" in file.read_bytes()]


@pytest.mark.parametrize(
    ("image", "form", "status", "text"),
    [
        (b"hello", {}, 415, "image: not a JPEG, PNG or WebP"),
        (b"", {}, 422, "image: the file is empty"),
        (lesion_image()[:500], {}, 422, "image: "),
        (cv2.imencode(".png", np.zeros((501, 501, 3), np.uint8))[1].tobytes(), {}, 413, "501x501 pixels"),
        (lesion_image() + bytes(100_000), {}, 413, "max_image_bytes"),
        (None, {"metadata": '{"age_approx": 400}'}, 422, "age_approx"),
        (None, {"metadata": '{"age_approx": NaN}'}, 422, "metadata: not valid JSON"),
        (None, {"acquired_at": "noon"}, 422, "acquired_at: 'noon'"),
        (None, {"patient_id": "x" * 300}, 422, "patient_id: 300 characters"),
        (None, {"device": "a\x00b"}, 422, "device: "),
        (None, {"metdata": "{}"}, 422, "metdata: unknown form field"),
    ],
)
def test_what_predict_refuses_is_refused_at_once_and_leaves_nothing(
    reference, places, dermray_home, image, form, status, text
):
    async def story():
        async with running(reference, places, started=False) as replica:
            problem(await replica.submit(image=image, **form), status, text)
        assert not (dermray_home / "images").exists()

    asyncio.run(story())


def test_a_picture_that_is_stored_larger_than_an_upload_may_be_is_scored(reference, places):
    """A WebP is kept as PNG, which may pass the limit of uploads."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    webp = cv2.imencode(".webp", noise, [cv2.IMWRITE_WEBP_QUALITY, 10])[1].tobytes()
    assert len(webp) < LIMITS.max_image_bytes

    async def story():
        async with running(reference, places) as replica:
            done = await replica.state(await replica.accepted(webp), "done", "failed")
            assert done["state"] == "done", done
            (row,) = replica.rows()
            size = len(replica.log.image_files.get(row["image_hash"], ".png"))
            assert size > LIMITS.max_image_bytes
            live = await replica.client.post("/v1/predict", files={"image": ("x", webp)})
            assert live.json()["risk"] == done["result"]["risk"]

    asyncio.run(story())


def test_a_key_is_one_submission_and_another_content_under_it_is_refused(reference, places):
    async def story():
        async with running(reference, places) as replica:
            name = await replica.accepted(key="visit-1", metadata=json.dumps(METADATA))
            assert await replica.accepted(key="visit-1", metadata=json.dumps(METADATA)) == name
            await replica.state(name, "done")
            again = await replica.submit(key="visit-1", metadata=json.dumps(METADATA))
            assert (again.json()["submission_id"], again.json()["state"]) == (name, "done")
            problem(await replica.submit(key="visit-1"), 422, "Idempotency-Key")
            problem(await replica.submit(lesion_image(5), "visit-1", metadata=json.dumps(METADATA)), 422, "Idempotency")
            problem(await replica.submit(key="two words"), 422, "Idempotency-Key")
            assert await replica.accepted(key="visit-2", metadata=json.dumps(METADATA)) != name
            assert len({await replica.accepted() for _ in range(2)}) == 2

    asyncio.run(story())


def test_a_key_of_predict_stands_for_nothing_here_and_none_can_be_a_submissions_own(reference, places):
    async def story():
        async with running(reference, places) as replica:
            await replica.client.post(
                "/v1/predict", files={"image": ("x", lesion_image(1))}, headers={"Idempotency-Key": "k"}
            )
            name = await replica.accepted(lesion_image(2), key="k")
            assert (await replica.state(name, "done", "failed"))["state"] == "done"
            response = await replica.client.post(
                "/v1/predict",
                files={"image": ("x", lesion_image(2))},
                headers={"Idempotency-Key": prediction_key(name)},
            )
            problem(response, 422, "Idempotency-Key")

    asyncio.run(story())


def test_only_its_caller_and_those_who_review_may_read_a_submission(reference, places):
    async def story():
        async with running(reference, places) as replica:
            name = await replica.accepted()
            for reader, status in (
                (Caller("clinic", "caller"), 200),
                (Caller("other", "caller"), 404),
                (Caller("other", "reviewer"), 200),
                (Caller("other", "approver"), 200),
                (Caller("other", "admin"), 200),
            ):
                replica.caller = reader
                assert (await replica.client.get(f"/v1/submissions/{name}")).status_code == status, reader
            for unknown in ("0" * 32, "x", "%00", "a" * 5000, "%ff", "..%2f..%2fetc"):
                response = await replica.client.get(f"/v1/submissions/{unknown}")
                assert response.status_code == 404 and set(response.json()) == {"error", "detail"}

    asyncio.run(story())


def test_a_full_queue_refuses_with_retry_after_and_writes_no_picture(reference, places, dermray_home):
    settings = SETTINGS.model_copy(update={"max_pending": 2})

    async def story():
        async with running(reference, places, settings, started=False) as replica:
            names = [await replica.accepted(lesion_image(seed), key=f"k{seed}") for seed in range(2)]
            pictures = len(list((dermray_home / "images").rglob("*.jpg")))
            response = await replica.submit(lesion_image(2))
            problem(response, 429, "max_pending")
            assert int(response.headers["Retry-After"]) >= 1
            assert len(list((dermray_home / "images").rglob("*.jpg"))) == pictures == 2
            # What was accepted stays accepted.
            assert await replica.accepted(lesion_image(0), key="k0") == names[0]
            replica.worker.start()
            for name in names:
                await replica.state(name, "done")
            await replica.accepted(lesion_image(2))

    asyncio.run(story())


def test_a_store_that_takes_nothing_gives_503(reference, places):
    broken = StorageSettings(**{**places.model_dump(), "store_url": "postgresql://nobody@127.0.0.1:1/none"})

    async def story():
        replica = Replica(reference, places)
        lost = open_log(broken)
        replica.queue._records._log = lost
        response = await replica.submit()
        problem(response, 503, "store does not answer")
        assert int(response.headers["Retry-After"]) >= 1
        problem(await replica.client.get(f"/v1/submissions/{'0' * 32}"), 503)
        await replica.client.aclose()

    asyncio.run(story())


def test_several_are_scored_at_a_time_and_never_more_than_the_settings_say(reference, places):
    settings = SETTINGS.model_copy(update={"concurrency": 3})

    async def story():
        async with running(reference, places, settings) as replica:
            replica.scorer.gate.clear()
            names = [await replica.accepted(lesion_image(seed)) for seed in range(7)]
            await until(lambda: replica.scorer.waiting == 3)
            states = [(await replica.status(name))["state"] for name in names]
            assert states.count("running") == 3 and states.count("queued") == 4
            replica.scorer.gate.set()
            for name in names:
                assert (await replica.state(name, "done"))["attempts"] == 1
            assert replica.scorer.most_waiting == 3 and replica.scorer.calls == len(replica.rows()) == 7

    asyncio.run(story())


def test_a_new_submission_wakes_the_worker_of_its_replica(reference, places):
    settings = SETTINGS.model_copy(update={"poll_interval_s": 10 * WAIT_S})

    async def story():
        async with running(reference, places, settings) as replica:
            for seed in range(3):
                await replica.state(await replica.accepted(lesion_image(seed)), "done")

    asyncio.run(story())


def test_replicas_that_share_a_store_score_every_submission_once(reference, places):
    async def story():
        async with running(reference, places) as first, running(reference, places) as second:
            gates = (first.scorer.gate, second.scorer.gate)
            for gate in gates:
                gate.clear()
            names = [await first.accepted(lesion_image(seed)) for seed in range(12)]
            await until(lambda: first.scorer.waiting + second.scorer.waiting == len(names))
            for gate in gates:
                gate.set()
            for name in names:
                assert (await second.state(name, "done"))["attempts"] == 1
            assert first.scorer.calls + second.scorer.calls == len(first.rows()) == 12
            assert min(first.scorer.calls, second.scorer.calls) >= 4

    asyncio.run(story())


def test_a_crash_between_scoring_and_saying_so_leaves_one_record(reference, places, monkeypatch):
    short = SETTINGS.model_copy(update={"lease_s": 3.0})

    async def story():
        dead = Replica(reference, places, short)
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()

        def die(*_):
            loop.call_soon_threadsafe(reached.set)
            raise RuntimeError("power cut")

        with monkeypatch.context() as patch:
            patch.setattr(submission_worker, "finish_submission", die)
            dead.worker.start()
            name = await dead.accepted()
            await asyncio.wait_for(reached.wait(), WAIT_S)
            await dead.crash()
        (row,) = dead.rows()
        assert (await dead.status(name))["state"] == "running"
        async with running(reference, places) as heir:
            done = await heir.state(name, "done", "failed")
            assert (done["state"], done["attempts"]) == ("done", 2)
            assert done["result"]["prediction_id"] == row["id"] and heir.rows() == [row]
            assert heir.scorer.calls == 0

    asyncio.run(story())


def test_what_waits_is_finished_after_a_restart_and_not_before_its_lease_ends(reference, places):
    short = SETTINGS.model_copy(update={"lease_s": 3.0, "concurrency": 2})

    async def story():
        dead = Replica(reference, places, short)
        dead.scorer.gate.clear()
        dead.worker.start()
        names = [await dead.accepted(lesion_image(seed)) for seed in range(4)]
        await until(lambda: dead.scorer.waiting == 2)
        await dead.crash()
        leases = {name: find_submission(dead.log.store, name)["leased_until"] for name in names}
        taken = {name: end for name, end in leases.items() if end is not None}
        assert len(taken) == 2
        async with running(reference, places) as heir:
            ended = {name: await heir.state(name, "done", "failed") for name in names}
            assert [done["state"] for done in ended.values()] == ["done"] * 4
            assert [name for name, done in ended.items() if done["attempts"] == 2] == list(taken)
            for name, end in taken.items():
                assert find_submission(heir.log.store, name)["finished_at"] >= end
            assert len(heir.rows()) == 4

    asyncio.run(story())


def _hang_in_the_middle(reference: dict, places: dict, marker: str) -> None:
    async def story():
        replica = Replica(
            ModelReference(**reference), StorageSettings(**places), SETTINGS.model_copy(update={"lease_s": 5.0})
        )
        replica.scorer.gate.clear()
        await replica.accepted(key="k")
        replica.worker.start()
        await until(lambda: replica.scorer.waiting)
        Path(marker).touch()
        await asyncio.Event().wait()

    asyncio.run(story())


def test_a_killed_process_loses_nothing(reference, places, tmp_path):
    marker = tmp_path / "scoring"
    arguments = (reference.model_dump(), places.model_dump(), str(marker))
    process = multiprocessing.get_context("spawn").Process(target=_hang_in_the_middle, args=arguments)
    process.start()
    try:
        deadline = time.monotonic() + WAIT_S
        while not marker.exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(WAIT_S)

    async def story():
        async with running(reference, places) as heir:
            done = await heir.state(await heir.accepted(key="k"), "done", "failed")
            assert (done["state"], done["attempts"], len(heir.rows())) == ("done", 2, 1)

    asyncio.run(story())


def test_a_node_that_is_away_costs_attempts_but_no_submission(reference, places, monkeypatch):
    async def story():
        async with running(reference, places) as replica:
            scored, failures = replica.scorer.score, 2

            async def busy(images, deadline):
                nonlocal failures
                failures -= 1
                if failures >= 0:
                    raise unavailable("the queue of ImageScorer is full", 2)
                return await scored(images, deadline)

            monkeypatch.setattr(replica.scorer, "score", busy)
            done = await replica.state(await replica.accepted(), "done", "failed")
            assert (done["state"], done["attempts"], done["error"]) == ("done", 3, None)
            assert len(replica.rows()) == 1

    asyncio.run(story())


def test_a_failed_attempt_is_shown_and_tried_again_only_after_its_back_off(reference, places, monkeypatch):
    slow = SETTINGS.model_copy(update={"backoff_s": 10 * WAIT_S})

    async def story():
        async with running(reference, places, slow) as replica:
            attempts = 0

            async def away(images, deadline):
                nonlocal attempts
                attempts += 1
                raise unavailable("replicas of ImageScorer die under this call", 2)

            monkeypatch.setattr(replica.scorer, "score", away)
            name = await replica.accepted()
            async with asyncio.timeout(WAIT_S):
                while (found := await replica.status(name))["error"] is None:
                    await asyncio.sleep(0.01)
            assert (found["state"], found["error"]["error"], found["finished_at"]) == ("queued", "unavailable", None)
            # A second one makes the worker look at the queue again; the first is not due yet.
            other = await replica.accepted(lesion_image(1))
            async with asyncio.timeout(WAIT_S):
                while (await replica.status(other))["error"] is None:
                    await asyncio.sleep(0.01)
            assert (await replica.status(name))["attempts"] == 1 and attempts == 2

    asyncio.run(story())


def test_the_waits_between_attempts_double(reference, places, monkeypatch):
    waits, now = [], submission_worker.now_us()
    monkeypatch.setattr(submission_worker, "now_us", lambda: now)

    async def story():
        async with running(reference, places, SETTINGS.model_copy(update={"attempts": 5})) as replica:
            requeue = submission_worker.requeue_submission

            def note(store, claim, not_before, error):
                waits.append(not_before - now)
                return requeue(store, claim, not_before, error)

            async def away(images, deadline):
                raise unavailable("away", 2)

            monkeypatch.setattr(submission_worker, "requeue_submission", note)
            monkeypatch.setattr(replica.scorer, "score", away)
            await replica.state(await replica.accepted(), "failed")

    asyncio.run(story())
    assert waits == [10_000, 20_000, 40_000, 80_000]


def test_after_the_last_attempt_it_failed_with_the_last_problem_and_quotes_nothing(reference, places, monkeypatch):
    async def story():
        async with running(reference, places) as replica:

            async def fail(images, deadline):
                raise RuntimeError("patient Jane")

            monkeypatch.setattr(replica.scorer, "score", fail)
            failed = await replica.state(await replica.accepted(), "failed")
            assert failed["attempts"] == 3 and failed["finished_at"] is not None and failed["result"] is None
            assert failed["error"]["error"] == "internal_error" and "Jane" not in failed["error"]["detail"]
            assert replica.rows() == []

    asyncio.run(story())


def test_what_can_never_succeed_is_not_tried_again(reference, places, monkeypatch):
    async def story():
        async with running(reference, places, started=False) as replica:
            name = await replica.accepted(metadata=json.dumps(METADATA))
            # A model deployed meanwhile that knows no such field.
            model = replica.service.model
            columns = {key: spec for key, spec in model.task.columns.items() if key != "age_approx"}
            task = model.task.model_copy(update={"columns": columns})
            replica.service.use_model(dataclasses.replace(model, task=task))
            replica.worker.start()
            failed = await replica.state(name, "failed", "done")
            assert (failed["state"], failed["attempts"]) == ("failed", 1)
            assert failed["error"]["error"] == "invalid_field" and "age_approx" in failed["error"]["detail"]

    asyncio.run(story())


def test_the_worker_goes_on_after_the_store_was_away(reference, places, monkeypatch):
    async def story():
        async with running(reference, places) as replica:
            claim, failures = submission_worker.claim_submissions, 0

            def away(*arguments):
                nonlocal failures
                if failures < 3:
                    failures += 1
                    raise ConnectionError("gone")
                return claim(*arguments)

            monkeypatch.setattr(submission_worker, "claim_submissions", away)
            await replica.state(await replica.accepted(), "done")
            assert failures == 3

    asyncio.run(story())


def test_a_worker_that_ends_unexpectedly_is_started_again(reference, places, monkeypatch):
    class Broken(BaseException):
        """Nothing that the loop expects."""

    async def story():
        async with running(reference, places, started=False) as replica:
            with monkeypatch.context() as patch:
                patch.setattr(replica.worker, "_claim", lambda: (_ for _ in ()).throw(Broken()))
                replica.worker.start()
                first = replica.worker._task
                await until(first.done)
            await replica.state(await replica.accepted(), "done")

    asyncio.run(story())


def test_a_request_that_ends_does_not_end_the_worker_it_woke(reference, places):
    """In the context of a request, Serve would cancel what it started together with it."""

    async def story():
        async with running(reference, places) as replica:
            seen = []
            marker = contextvars.ContextVar("request")
            scored = replica.scorer.score

            async def look(images, deadline):
                seen.append(marker.get(None))
                return await scored(images, deadline)

            replica.scorer.score = look
            marker.set("live")
            await replica.worker.stop()
            replica.worker = SubmissionWorker(replica.service, replica.log, SETTINGS)
            replica.worker.start()
            await replica.state(await replica.accepted(), "done")
            assert seen == [None]

    asyncio.run(story())


def test_a_replica_that_stops_settles_what_it_claimed_and_claims_no_more(reference, places):
    settings = SETTINGS.model_copy(update={"concurrency": 1})

    async def story():
        async with running(reference, places, settings) as replica:
            replica.scorer.gate.clear()
            names = [await replica.accepted(lesion_image(seed)) for seed in range(2)]
            await until(lambda: replica.scorer.waiting == 1)
            stopping = asyncio.create_task(replica.worker.stop())
            await asyncio.sleep(0)
            replica.scorer.gate.set()
            await stopping
            states = {(await replica.status(name))["state"] for name in names}
            assert states == {"done", "queued"}

    asyncio.run(story())


def test_an_erased_submission_is_not_scored_any_more(reference, places):
    async def story():
        async with running(reference, places, started=False) as replica:
            erased = await replica.accepted(lesion_image(1), patient_id="p")
            kept = await replica.accepted(lesion_image(2))
            with replica.log.store.writing() as connection:
                assert erase_submissions(connection, patient_hmac("p", b"a test's secret")) == 1
            replica.worker.start()
            await replica.state(kept, "done")
            assert (await replica.client.get(f"/v1/submissions/{erased}")).status_code == 404
            assert len(replica.rows()) == 1

    asyncio.run(story())


def test_a_lease_that_a_request_can_outlive_is_refused(places):
    with pytest.raises(ValidationError, match="lease_s is 30; expected more than ingress.request_timeout_s 30"):
        ServeSettings(storage=places, submissions=SubmissionSettings(lease_s=30))
    with pytest.raises(ValidationError):
        SubmissionSettings(concurrency=0)


def test_a_503_stays_an_error_and_no_answer(reference, places):
    """An outcome in the list, not raised: as a batch would give it."""

    async def story():
        async with running(reference, places) as replica:

            async def refuse(requests, route):
                return [ApiError(503, "unavailable", "away", 2) for _ in requests]

            replica.service.predict = refuse
            failed = await replica.state(await replica.accepted(), "failed")
            assert (failed["attempts"], failed["error"]["error"]) == (3, "unavailable")

    asyncio.run(story())


@pytest.mark.postgres
def test_on_postgresql_two_replicas_share_the_queue(reference, places, postgres_url):
    shared = StorageSettings(**{**places.model_dump(), "store_url": postgres_url})

    async def story():
        async with running(reference, shared) as first, running(reference, shared) as second:
            names = [await first.accepted(lesion_image(seed), key=f"k{seed}", patient_id="p") for seed in range(12)]
            assert await second.accepted(lesion_image(0), key="k0", patient_id="p") == names[0]
            for name in names:
                done = await second.state(name, "done", "failed")
                assert (done["state"], done["attempts"]) == ("done", 1)
            assert first.scorer.calls + second.scorer.calls == len(first.rows()) == 12

    asyncio.run(story())
