"""The drift logger sends alarms beside its commits, and never waits for a receiver."""

from __future__ import annotations

import asyncio
import logging
import queue

import pytest

from monitoring.alarm_channels import ServiceAlarmSettings
from serve import alarm_sender
from serve.alarm_sender import AlarmSender
from serve.drift_logger import DriftLogger, open_log
from store.alarm_records import alarms_page
from store.database import StoreUnavailableError
from tests.bundle_factory import storage
from tests.test_serve_drift_logger import entry
from tests.webhook_receiver import WAIT_S, webhook_receiver

ALARM = {"kind": "drift", "severity": "warning", "message": "m", "detail": {}}


@pytest.fixture
def places(dermray_home, monkeypatch):
    monkeypatch.setenv("SECRET", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    return storage(dermray_home)


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "ray.serve")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "ray.serve"]


def settings(receiver, **values) -> ServiceAlarmSettings:
    channel = {"name": "ops", "url": receiver.url, "secret_env": "SECRET"}
    return ServiceAlarmSettings(channels=[channel], **{"interval_s": 0.05, "message_gap_s": 0, **values})


def ended(sender: AlarmSender) -> bool:
    sender._thread.join(WAIT_S)
    return not sender._thread.is_alive()


def test_commits_do_not_wait_for_a_receiver_that_hangs(places):
    async def scenario():
        with webhook_receiver("hang") as receiver:
            alarms = settings(receiver, timeout_s=60).model_dump()
            sidecar = DriftLogger(places.model_dump(), alarms=alarms)
            sidecar._log.store.raise_alarm({**ALARM, "dedupe_key": "a"})
            await sidecar.ping()
            await asyncio.to_thread(receiver.wait)
            async with asyncio.timeout(WAIT_S):
                for index in range(3):
                    assert await sidecar.write([entry(index)]) == [None]
            assert alarms_page(sidecar._log.store, False, None, None, 1)[0]["deliveries"] == {"ops": "pending"}
            sidecar.__del__()
            receiver.let_go.set()
            assert await asyncio.to_thread(ended, sidecar._alarm_sender)
            await sidecar._sampler.stop()

    asyncio.run(scenario())


def test_an_alarm_that_comes_later_is_sent_by_a_later_pass(places):
    with webhook_receiver() as receiver:
        log = open_log(places)
        sender = AlarmSender(log, settings(receiver))
        sender.start()
        for key in ("a", "b"):
            log.store.raise_alarm({**ALARM, "dedupe_key": key, "message": key})
            assert receiver.wait().content["data"]["alarms"][0]["message"] == key
        sender.stop()
        assert ended(sender)


def test_a_database_that_is_away_is_one_line_until_it_is_back(places, lines, monkeypatch):
    begun, go_on = queue.Queue(), queue.Queue()

    def wait(seconds):
        begun.put(seconds)
        return go_on.get(timeout=WAIT_S)

    class Away(alarm_sender.AlarmDelivery):
        failures = 3

        def deliver(self):
            if Away.failures:
                Away.failures -= 1
                raise StoreUnavailableError("the database is away")
            return super().deliver()

    monkeypatch.setattr(alarm_sender, "AlarmDelivery", Away)
    with webhook_receiver() as receiver:
        log = open_log(places)
        log.store.raise_alarm({**ALARM, "dedupe_key": "a"})
        sender = AlarmSender(log, settings(receiver, interval_s=7), wait)
        sender.start()
        for _ in range(3):
            assert begun.get(timeout=WAIT_S) == 7
            go_on.put(False)
        begun.get(timeout=WAIT_S)
        assert len(receiver.received) == 1
        go_on.put(True)
        assert ended(sender)
    assert [line for line in lines() if "the database is away" in line] == [
        "alarms are not sent, which is tried every 7 s: StoreUnavailableError('the database is away')"
    ]
    assert "alarms: 1 sent" in lines()


def test_a_url_that_is_a_secret_is_in_no_line_of_the_log(places, caplog):
    caplog.set_level(logging.INFO)
    with webhook_receiver() as receiver:
        log = open_log(places)
        log.store.raise_alarm({**ALARM, "dedupe_key": "a"})
        sender = AlarmSender(log, settings(receiver))
        sender.start()
        receiver.wait()
        sender.stop()
        assert ended(sender)
        assert receiver.url not in caplog.text


def test_without_channels_nothing_runs(places):
    sender = AlarmSender(open_log(places), ServiceAlarmSettings())
    sender.start()
    assert sender._thread is None
    sender.stop()
