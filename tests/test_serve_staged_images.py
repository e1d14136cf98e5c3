"""Pictures that are written ahead of their rows: none is missing when the rows are there, none stays without them."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path

import pytest

from monitoring.prediction_log import PredictionLog, PredictionRecord
from serve.drift_logger import LogEntry, open_log
from serve.durable_log import DurableLog
from serve.errors import ApiError
from serve.lesion import LesionRequest
from serve.served_model import ServedModel
from serve.settings import DriftLoggerSettings
from store import synced_files
from store.image_files import StoredImage, prepare_image
from store.synced_files import SyncedFolders
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    LocalSidecar,
    lesion_image,
    prediction_service,
    served_bundle,
    storage,
)

SETTINGS = DriftLoggerSettings(attempts=1, attempt_timeout_s=1, replay_interval_s=0.05)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("staged") / "bundle")


@pytest.fixture
def places(dermray_home):
    return storage(dermray_home)


def pictures(count: int) -> list[StoredImage]:
    return [prepare_image(lesion_image(index)) for index in range(count)]


def entry(images: list[StoredImage]) -> LogEntry:
    records = tuple(PredictionRecord(model_version="1", context="none", image_hash=image.hash) for image in images)
    return LogEntry(records, {image.hash: image.data for image in images})


def files_of(log: PredictionLog, images: list[StoredImage]) -> list[bool]:
    return [log.image_files.exists(image.hash, image.suffix) for image in images]


def image_files(places) -> list[Path]:
    return [path for path in Path(places.images_url).rglob("*") if path.is_file()]


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def test_they_are_on_disk_before_the_rows_and_are_not_written_again(places, monkeypatch):
    images = pictures(6)

    async def scenario():
        log = open_log(places)
        durable = DurableLog(LocalSidecar(places), log, SETTINGS)
        staged = durable.stage()
        staged.add(images[:4])
        staged.add(images[4:])
        on_disk = await staged.on_disk()
        assert on_disk == {image.hash for image in images}
        assert all(files_of(log, images))
        written = []
        monkeypatch.setattr(SyncedFolders, "write", lambda _, files: written.extend(files))
        await durable.write(dataclasses.replace(entry(images), on_disk=on_disk))
        assert written == []

    asyncio.run(scenario())
    assert len(list(open_log(places).store.predictions_between(0, 2**62))) == 6


def test_one_that_was_removed_meanwhile_is_written_with_its_row(places):
    images = pictures(3)

    async def scenario():
        log = open_log(places)
        durable = DurableLog(LocalSidecar(places), log, SETTINGS)
        staged = durable.stage()
        staged.add(images)
        on_disk = await staged.on_disk()
        log.image_files.remove(images[1].hash)
        await durable.write(dataclasses.replace(entry(images), on_disk=on_disk))
        assert files_of(log, images) == [True] * 3

    asyncio.run(scenario())


def test_those_of_a_request_that_failed_are_removed_but_not_what_a_record_names(places):
    images = pictures(4)

    async def scenario():
        log = open_log(places)
        durable = DurableLog(LocalSidecar(places), log, SETTINGS)
        await durable.write(entry(images[:1]))
        staged = durable.stage()
        staged.add(images)
        staged.abandon()
        await until(lambda: files_of(log, images) == [True, False, False, False])

    asyncio.run(scenario())


def test_a_disk_that_takes_none_costs_nothing_but_the_head_start(places, monkeypatch):
    images = pictures(2)

    async def scenario():
        log = open_log(places)
        durable = DurableLog(LocalSidecar(places), log, SETTINGS)

        def full(_images):
            raise OSError("no space left on device")

        staged = durable.stage()
        with monkeypatch.context() as patch:
            patch.setattr(log.image_files, "put_many", full)
            staged.add(images)
            on_disk = await staged.on_disk()
        assert on_disk == frozenset()
        await durable.write(dataclasses.replace(entry(images), on_disk=on_disk))
        assert all(files_of(log, images))

    asyncio.run(scenario())


def test_a_bucket_has_no_lock_so_nothing_is_written_ahead_there(places):
    log = open_log(places.model_copy(update={"images_url": "memory://images"}))
    assert DurableLog(LocalSidecar(places), log, SETTINGS).stage() is None


def test_a_spooling_node_writes_nothing_ahead(places):
    durable = DurableLog(LocalSidecar(places), open_log(places), SETTINGS)
    assert durable.stage() is not None
    durable.spooling = True
    assert durable.stage() is None


def test_a_request_whose_scores_fail_leaves_no_picture_behind(reference, places):
    scorer = LocalScorer(reference)
    score, log = scorer.score, open_log(places)
    seen = []

    async def fails_at_the_second_part(images, deadline):
        seen.append(len(images))
        if len(seen) == 1:
            return await score(images, deadline)
        await until(lambda: len(image_files(places)) >= 4)
        raise ApiError(503, "unavailable", "the scorer is gone")

    scorer.score = fails_at_the_second_part
    service = prediction_service((scorer, LocalFusion(reference)), DurableLog(LocalSidecar(places), log, SETTINGS))
    service.use_model(ServedModel.load(reference))
    requests = [LesionRequest(lesion_image(index)) for index in range(12)]

    async def scenario():
        with pytest.raises(ApiError, match="the scorer is gone"):
            await service.predict(requests, "/v1/predict/batch")
        await until(lambda: not image_files(places))

    asyncio.run(scenario())
    assert len(seen) >= 2


def test_a_batch_answers_with_every_picture_on_disk(reference, places):
    log = open_log(places)
    sidecar = LocalSidecar(places)
    service = prediction_service((LocalScorer(reference), LocalFusion(reference)), DurableLog(sidecar, log, SETTINGS))
    service.use_model(ServedModel.load(reference))
    requests = [LesionRequest(lesion_image(index)) for index in range(20)]
    outcomes = asyncio.run(service.predict(requests, "/v1/predict/batch"))
    (entries,) = sidecar.calls
    assert len(entries[0].on_disk) == 20, "all were written ahead"
    for record, _ in outcomes:
        assert log.image_files.exists(record.image_hash, ".jpg")


def test_a_request_that_is_alone_writes_its_picture_ahead_and_those_that_are_not_share_a_commit(reference, places):
    log = open_log(places)
    sidecar, scorer = LocalSidecar(places), LocalScorer(reference)
    service = prediction_service((scorer, LocalFusion(reference)), DurableLog(sidecar, log, SETTINGS))
    service.use_model(ServedModel.load(reference))

    async def scenario():
        for _ in range(2):
            await service.predict([LesionRequest(lesion_image(1))], "/v1/predict")
        await asyncio.gather(
            *(service.predict([LesionRequest(lesion_image(index))], "/v1/predict") for index in range(2, 5))
        )

    asyncio.run(scenario())
    ahead = [len(entry.on_disk) for entries in sidecar.calls for entry in entries]
    assert ahead[:2] == [1, 1] and sorted(ahead[2:]) == [0, 0, 1]


def test_a_disk_that_hangs_is_not_waited_for_and_leaves_nothing_behind_when_the_request_ends(places, monkeypatch):
    images = pictures(2)

    async def scenario():
        log = open_log(places)
        durable = DurableLog(LocalSidecar(places), log, SETTINGS.model_copy(update={"attempt_timeout_s": 0.1}))
        put_many, hangs = log.image_files.put_many, threading.Event()

        def hanging(data):
            assert hangs.wait(20)
            return put_many(data)

        staged = durable.stage()
        with monkeypatch.context() as patch:
            patch.setattr(log.image_files, "put_many", hanging)
            staged.add(images)
            assert await staged.on_disk() == frozenset()
            # The client goes away in the middle of the wait.
            waits = asyncio.create_task(staged.on_disk())
            await asyncio.sleep(0)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            removed = []
            patch.setattr(log, "remove_unnamed", lambda hashes: removed.append(set(hashes)))
            staged.abandon()
            hangs.set()
            await until(lambda: removed)
        assert all(files_of(log, images)), "removed only after they were written"
        assert removed == [{image.hash for image in images}]

    asyncio.run(scenario())


def test_a_write_that_fails_half_way_is_removed_whole(places, monkeypatch):
    images = pictures(6)

    async def scenario():
        log = open_log(places)
        durable = DurableLog(LocalSidecar(places), log, SETTINGS)
        replace = synced_files.os.replace

        def full_at_the_third(temporary, path):
            if images[2].hash in str(path):
                raise OSError("no space left on device")
            replace(temporary, path)

        monkeypatch.setattr(synced_files.os, "replace", full_at_the_third)
        staged = durable.stage()
        staged.add(images)
        assert await staged.on_disk() == frozenset()
        assert 0 < sum(files_of(log, images)) < 6
        staged.abandon()
        await until(lambda: not any(files_of(log, images)))

    asyncio.run(scenario())
