"""The drift logger sweeps its images at once and at every interval, whatever became of the sweep before."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve import image_sweeper
from serve.drift_logger import DriftLogger, open_log
from serve.image_sweeper import ImageSweeper
from serve.settings import DriftLoggerSettings, ServeSettings
from store.database import StoreUnavailableError
from store.image_files import prepare_image
from tests.bundle_factory import lesion_image, storage
from tests.test_serve_drift_logger import entry

WAIT_S = 30


@pytest.fixture
def places(dermray_home):
    return storage(dermray_home)


def old_picture(places, index: int = 0) -> Path:
    """An image file that no row names."""
    log, image = open_log(places), prepare_image(lesion_image(index))
    log.image_files.put(image.data)
    path = Path(log.image_files.path(image.hash, image.suffix))
    os.utime(path, (time.time() - 7200,) * 2)
    return path


class Waits:
    """Instead of the wait between sweeps: tells that one begins, and ends it when told to."""

    def __init__(self):
        self.begun: queue.Queue[float] = queue.Queue()
        self.ends: queue.Queue[bool] = queue.Queue()

    def __call__(self, seconds: float) -> bool:
        self.begun.put(seconds)
        return self.ends.get(timeout=WAIT_S)


@pytest.fixture
def waits():
    return Waits()


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "ray.serve")
    return lambda: [record.getMessage() for record in caplog.records if "swept" in record.getMessage()]


def ended(sweeper: ImageSweeper) -> bool:
    sweeper._thread.join(WAIT_S)
    return not sweeper._thread.is_alive()


def test_it_sweeps_at_once_and_after_each_interval_in_one_thread_of_its_own(places, waits, lines):
    sweeper = ImageSweeper(open_log(places), DriftLoggerSettings(sweep_interval_s=600), waits)
    first = old_picture(places, 0)
    sweeper.start()
    thread = sweeper._thread
    sweeper.start()
    assert sweeper._thread is thread is not threading.current_thread()
    assert waits.begun.get(timeout=WAIT_S) == 600
    assert not first.exists()
    second = old_picture(places, 1)
    waits.ends.put(False)
    assert waits.begun.get(timeout=WAIT_S) == 600
    assert not second.exists()
    waits.ends.put(True)
    assert ended(sweeper)
    assert len(lines()) == 2
    assert ": of 1 older than 3600 s, 1 that no record names were removed, and 0 unfinished files" in lines()[0]


def test_a_failed_sweep_is_one_line_and_the_next_comes_at_its_time(places, waits, lines, monkeypatch):
    picture = old_picture(places)
    sweep, calls = image_sweeper.sweep_images, []

    def fails_twice(*arguments):
        calls.append(arguments)
        if len(calls) <= 2:
            raise [StoreUnavailableError("the database is away"), OSError("the disk fails")][len(calls) - 1]
        return sweep(*arguments)

    monkeypatch.setattr(image_sweeper, "sweep_images", fails_twice)
    sweeper = ImageSweeper(open_log(places), DriftLoggerSettings(sweep_interval_s=60), waits)
    sweeper.start()
    for failure in ("the database is away", "the disk fails"):
        assert waits.begun.get(timeout=WAIT_S) == 60
        assert failure in lines()[-1] and "tried again in 60 s" in lines()[-1]
        assert picture.exists()
        waits.ends.put(False)
    waits.begun.get(timeout=WAIT_S)
    assert not picture.exists()
    assert len(lines()) == 3
    waits.ends.put(True)
    assert ended(sweeper)


def test_stop_ends_the_wait_between_sweeps(places):
    sweeper = ImageSweeper(open_log(places), DriftLoggerSettings())
    sweeper.start()
    sweeper.stop()
    assert ended(sweeper)


def test_stop_ends_a_sweep_under_way(places, monkeypatch):
    under_way, results = threading.Event(), queue.Queue()

    def endless(_store, _files, _age, pause):
        under_way.set()
        results.put(any(pause() for _ in range(10_000)))
        raise OSError("ended")

    monkeypatch.setattr(image_sweeper, "sweep_images", endless)
    sweeper = ImageSweeper(open_log(places), DriftLoggerSettings())
    sweeper.start()
    assert under_way.wait(WAIT_S)
    sweeper.stop()
    assert ended(sweeper) and results.get(timeout=WAIT_S) is True


@pytest.mark.parametrize("why", ["a bucket", "turned off"])
def test_nothing_runs_where_there_is_nothing_to_sweep(places, why):
    if why == "a bucket":
        places = places.model_copy(update={"images_url": "memory://images"})
    settings = DriftLoggerSettings(sweep_interval_s=None if why == "turned off" else 60)
    sweeper = ImageSweeper(open_log(places), settings)
    sweeper.start()
    assert sweeper._thread is None
    sweeper.stop()


@pytest.mark.parametrize("call", ["write", "ping"])
def test_the_drift_logger_begins_with_its_first_call_and_ends_it_with_its_replica(places, lines, call):
    picture = old_picture(places, 7)

    async def scenario():
        settings = DriftLoggerSettings(sweep_min_age_s=7000)
        sidecar = DriftLogger(places.model_dump(), settings.model_dump())
        assert sidecar._sweeper._thread is None
        await (sidecar.write([entry(1)]) if call == "write" else sidecar.ping())
        async with asyncio.timeout(WAIT_S):
            while not lines():
                await asyncio.sleep(0.01)
        sidecar.__del__()
        assert await asyncio.to_thread(ended, sidecar._sweeper)
        await sidecar._sampler.stop()

    asyncio.run(scenario())
    assert not picture.exists()
    (line,) = lines()
    assert "older than 7000 s, 1 that no record names" in line


def test_a_sweep_that_would_take_pictures_of_requests_under_way_is_refused(places):
    slow = {"storage": places, "ingress": {"request_timeout_s": 120}, "submissions": {"lease_s": 200}}
    with pytest.raises(
        ValidationError, match="drift_logger.sweep_min_age_s is 120; expected more than ingress.request_timeout_s 120"
    ):
        ServeSettings(**slow, drift_logger={"sweep_min_age_s": 120})
    ServeSettings(**slow, drift_logger={"sweep_min_age_s": 121})
    ServeSettings(**slow, drift_logger={"sweep_min_age_s": 120, "sweep_interval_s": None})
