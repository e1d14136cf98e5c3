"""A patient is erased while requests of theirs are under way: nothing of them stays, and the client is told."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from monitoring.prediction_log import PredictionRecord, patient_hmac
from serve.drift_logger import DriftLogger, open_log
from serve.durable_log import DurableLog
from serve.settings import DriftLoggerSettings
from store import erased_patients
from store.image_files import prepare_image
from store.tables import now_us
from tests.bundle_factory import lesion_image, served_bundle, storage
from tests.test_serve_submissions import Replica, running, until

PATIENT = {"patient_id": "p"}
HMAC = patient_hmac("p", b"a test's secret")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("races") / "bundle", version="7")


@pytest.fixture
def places(dermray_home):
    return storage(dermray_home)


def predict(replica: Replica, seed=0, **form):
    return replica.client.post("/v1/predict", files={"image": ("x", lesion_image(seed))}, data=form)


def is_erased(response):
    assert response.status_code == 410, response.text
    body = response.json()
    assert set(body) == {"error", "detail"} and body["error"] == "patient_erased"
    assert body["detail"].startswith("patient_id: the patient was erased")
    assert "Retry-After" not in response.headers


def pictures(home):
    return {path.stem for path in (home / "images").rglob("*.*") if path.is_file()}


@contextlib.asynccontextmanager
async def while_scored(replica: Replica, waiting: int):
    """Inside, so many calls of the scorer wait; after it, they go on."""
    await until(lambda: replica.scorer.waiting == waiting)
    yield
    replica.scorer.gate.set()


async def erase(replica: Replica):
    response = await replica.client.delete("/v1/patients/p")
    assert response.status_code == 200, response.text


def test_a_prediction_that_is_being_scored_leaves_nothing_and_its_neighbours_do(reference, places, dermray_home):
    async def story():
        async with running(reference, places, started=False) as replica:
            replica.scorer.gate.clear()
            files = [("images", ("x", lesion_image(seed))) for seed in (1, 2)]
            requests = [
                asyncio.create_task(predict(replica, 0, **PATIENT)),
                asyncio.create_task(replica.client.post("/v1/predict/batch", files=files, data=PATIENT)),
                asyncio.create_task(predict(replica, 3, patient_id="q")),
                asyncio.create_task(predict(replica, 1)),
            ]
            async with while_scored(replica, 4):
                await erase(replica)
            theirs, batch, other, nobody = await asyncio.gather(*requests)
            is_erased(theirs)
            is_erased(batch)
            assert other.status_code == nobody.status_code == 200
            rows = {row["id"]: row for row in replica.rows()}
            assert set(rows) == {other.json()["prediction_id"], nobody.json()["prediction_id"]}
            assert pictures(dermray_home) == {row["image_hash"] for row in rows.values()}
            again = await predict(replica, 0, **PATIENT)
            assert again.status_code == 200, "received after the erasure: a new visit"
            assert again.json()["prediction_id"] in {row["id"] for row in replica.rows()}

    asyncio.run(story())


def test_what_waits_at_the_door_was_received_before(reference, places):
    """Not only what was parsed: the time is that of the arrival."""

    async def story():
        async with running(reference, places, started=False) as replica:
            read, go_on = asyncio.Event(), asyncio.Event()

            async def slow_form():
                yield b"--b\r\nContent-Disposition: form-data; name=patient_id\r\n\r\np\r\n--b\r\n"
                read.set()
                await go_on.wait()
                yield b'Content-Disposition: form-data; name=image; filename="x"\r\n\r\n' + lesion_image()
                yield b"\r\n--b--\r\n"

            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            request = asyncio.create_task(replica.client.post("/v1/predict", content=slow_form(), headers=headers))
            await asyncio.wait_for(read.wait(), 30)
            await erase(replica)
            go_on.set()
            is_erased(await request)
            assert replica.rows() == []

    asyncio.run(story())


def test_the_sidecars_refusal_is_told_from_a_failure(reference, places):
    """Through the deployment's own class, whose errors cross processes."""

    async def story():
        async with running(reference, places, started=False) as replica:
            settings = DriftLoggerSettings(attempts=1, attempt_timeout_s=5)
            replica.service._log = DurableLog(DriftLogger(places.model_dump()), open_log(places), settings)
            replica.scorer.gate.clear()
            request = asyncio.create_task(predict(replica, **PATIENT))
            async with while_scored(replica, 1):
                await erase(replica)
            is_erased(await request)
            assert replica.log.spool.pending() == 0 and replica.rows() == []

    asyncio.run(story())


def test_a_submission_that_is_being_uploaded_is_refused_with_its_picture(reference, places, dermray_home, monkeypatch):
    async def story():
        async with running(reference, places, started=False) as replica:
            check, checked, go_on = replica.service.check_image, asyncio.Event(), asyncio.Event()

            async def slowly(data):
                stored = await check(data)
                checked.set()
                await go_on.wait()
                return stored

            monkeypatch.setattr(replica.service, "check_image", slowly)
            request = asyncio.create_task(replica.submit(**PATIENT))
            await asyncio.wait_for(checked.wait(), 30)
            await erase(replica)
            go_on.set()
            is_erased(await request)
            assert pictures(dermray_home) == set()
            assert (await replica.submit(**PATIENT)).status_code == 202

    asyncio.run(story())


@pytest.mark.parametrize("clock_behind_us", [0, 3_600_000_000], ids=["clocks agree", "the eraser's clock is behind"])
def test_a_submission_that_is_being_scored_leaves_nothing(
    reference, places, dermray_home, monkeypatch, clock_behind_us
):
    monkeypatch.setattr(erased_patients, "now_us", lambda: now_us() - clock_behind_us)

    async def story():
        async with running(reference, places) as replica:
            replica.scorer.gate.clear()
            name = await replica.accepted(lesion_image(1), **PATIENT)
            async with while_scored(replica, 1):
                await erase(replica)
                kept = await predict_new_visit(replica)
            await until(lambda: not replica.worker._scoring)
            assert (await replica.client.get(f"/v1/submissions/{name}")).status_code == 404
            assert [row["id"] for row in replica.rows()] == [kept["id"]]
            assert pictures(dermray_home) == {kept["image_hash"]}
            erasures = [entry for entry in replica.log.store.audit_entries() if entry["action"] == "erase_patient"]
            late = "submission worker" if clock_behind_us else "prediction log"
            assert [entry["actor"] for entry in erasures] == ["clinic", late]
            assert erasures[1]["subject"] == f"patient/{HMAC}"

    async def predict_new_visit(replica):
        # Into the store directly: the scorer is busy with the other.
        image = prepare_image(lesion_image(2))
        record = PredictionRecord(patient_hmac=HMAC, image_hash=image.hash, model_version="7", context="none")
        replica.log.write([record], {image.hash: image.data})
        return record.to_row()

    asyncio.run(story())


def test_a_submission_that_went_to_another_worker_keeps_its_prediction(reference, places):
    """Its row is there: only a row that is gone says that the patient was erased."""

    async def story():
        async with running(reference, places, started=False) as replica:
            name = await replica.accepted(lesion_image(1), **PATIENT)
            settle = replica.worker._settle
            replica.worker._settle = lambda *arguments: settle(*arguments) and False
            replica.worker.start()
            await replica.state(name, "done")
            await until(lambda: not replica.worker._scoring)
            assert len(replica.rows()) == 1

    asyncio.run(story())
