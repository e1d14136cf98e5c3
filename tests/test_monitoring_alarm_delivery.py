"""Alarms reach their receivers, at least once and under one id, whatever the receivers and the senders do."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sql
from pydantic import ValidationError

from monitoring import alarm_delivery
from monitoring.alarm_channels import AlarmChannel, AlarmDeliverySettings
from monitoring.alarm_delivery import AlarmDelivery, wait_after
from monitoring.webhook import parse_secrets, signed_headers
from store.alarm_records import alarms_page
from store.database import open_store
from store.labels import NewLabel, add_label
from store.tables import alarm_deliveries, now_us
from tests.log_rows import prediction_row
from tests.test_house_imports import REPO_ROOT
from tests.webhook_receiver import WAIT_S, webhook_receiver

pytestmark = pytest.mark.slow

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ENVIRONMENT = {"SECRET": SECRET}


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


@pytest.fixture
def receiver():
    with webhook_receiver() as one:
        yield one


def settings(*channels, **values):
    return AlarmDeliverySettings(channels=list(channels), **{"timeout_s": 5, **values})


def channel(receiver, name="ops", **values):
    return AlarmChannel(**{"name": name, "url": receiver.url, "secret_env": "SECRET", **values})


def sender(store, *channels, environment=ENVIRONMENT, **values):
    return AlarmDelivery(store, settings(*channels, **values), environment=environment)


def raise_alarm(store, key="a", **fields):
    row = {"dedupe_key": key, "kind": "drift", "severity": "warning", "message": f"drift {key}", "detail": {}}
    assert store.raise_alarm({**row, **fields})


def states(store):
    return {row["dedupe_key"]: row["deliveries"] for row in alarms_page(store, False, None, None, 100)}


def make_due(store):
    """As if the back-off, or the lease of a sender that died, were over."""
    with store.writing() as connection:
        connection.execute(sql.update(alarm_deliveries).values(next_attempt_at=0, leased_until=None))


def test_an_alarm_arrives_signed_and_is_not_sent_again(store, receiver):
    raise_alarm(store, detail={"window": "2026-11-21", "drifted": ["red"], "labeller": "rita"}, model_version="3")
    delivery = sender(store, channel(receiver))
    assert delivery.deliver() == {"sent": 1}
    assert delivery.deliver() == {}
    (request,) = receiver.received
    timestamp = int(request.headers["webhook-timestamp"])
    assert abs(timestamp - now_us() / 1e6) < 60
    signed = signed_headers(request.id, timestamp, request.body, parse_secrets(SECRET))
    assert request.headers["webhook-signature"] == signed["webhook-signature"]
    assert request.content["type"] == "dermray.alarms"
    data = request.content["data"]
    assert (data["channel"], data["count"], data["not_listed"]) == ("ops", 1, 0)
    (told,) = data["alarms"]
    assert (told["kind"], told["message"], told["model_version"]) == ("drift", "drift a", "3")
    assert told["detail"] == {"window": "2026-11-21", "drifted": ["red"]}
    assert states(store) == {"a": {"ops": "sent"}}


def test_a_missed_cancer_is_told_without_anything_of_the_patient(store, receiver):
    secrets = {"patient_hmac": "f" * 64, "institution": "St Mary", "metadata": {"age_approx": 61, "sex": "female"}}
    row = prediction_row("p1", **secrets, risk=0.002, threshold=0.01, abstained=False)
    store.insert_predictions([row])
    label = NewLabel("p1", "melanoma-in-situ", True, "dr-rita", comment="patient Jane Doe, left arm")
    assert add_label(store, label, "dr-rita").alarm is not None
    sender(store, channel(receiver), channel(receiver, "chat", format="text")).deliver()
    for request in receiver.received:
        text = request.body.decode()
        assert "p1" in text and "0.002" in text and "0.01" in text
        for secret in ("f" * 64, "St Mary", "age_approx", "female", "melanoma", "rita", "Jane"):
            assert secret not in text, secret
    (told,) = next(r.content["data"]["alarms"] for r in receiver.received if "data" in r.content)
    assert told["detail"] == {"prediction_id": "p1", "risk": 0.002, "threshold": 0.01}
    assert told["severity"] == "critical"


def test_five_hundred_alarms_are_one_message_with_the_most_urgent_first(store, receiver):
    for index in range(500):
        raise_alarm(store, f"k{index}", severity="critical" if index == 499 else "warning")
    assert sender(store, channel(receiver), channel(receiver, "chat", format="text")).deliver() == {"sent": 1000}
    data = next(request.content["data"] for request in receiver.received if "data" in request.content)
    assert (data["count"], len(data["alarms"]), data["not_listed"]) == (500, 20, 480)
    assert data["alarms"][0]["message"] == "drift k499" and data["by_severity"] == {"critical": 1, "warning": 499}
    text = next(request.content["text"] for request in receiver.received if "text" in request.content)
    assert text.splitlines()[0] == "dermray: 500 alarms (500 drift)"
    assert text.splitlines()[1] == "[critical] #500 drift k499" and text.splitlines()[-1].startswith("and 480 more")


def test_text_of_clients_calls_nobody_in_a_chat(store, receiver):
    raise_alarm(store, message="drift in institution=<!channel> & co")
    sender(store, channel(receiver, format="text", secret_env=None), environment={}).deliver()
    (request,) = receiver.received
    assert "institution=&lt;!channel&gt; &amp; co" in request.content["text"]
    assert "webhook-signature" not in request.headers


@pytest.mark.parametrize("answer", [500, 429, 400, (302, {"location": "/elsewhere"}), "close"])
def test_what_a_receiver_does_not_take_comes_again_under_the_same_id(store, answer, caplog):
    with webhook_receiver(answer) as receiver:
        raise_alarm(store)
        delivery = sender(store, channel(receiver))
        with caplog.at_level(logging.INFO):
            assert delivery.deliver() == {"pending": 1}
            assert delivery.deliver() == {}
        lines = [record.getMessage() for record in caplog.records if record.name == alarm_delivery.logger.name]
        assert len(lines) == 1 and "channel ops did not take 1 alarms" in lines[0] and "attempt 1 of 30" in lines[0]
        make_due(store)
        raise_alarm(store, "b")
        assert delivery.deliver() == {"sent": 1}
        assert delivery.deliver() == {"sent": 1}
        first, second, third = receiver.received
        assert first.id == second.id != third.id
        assert first.body == second.body


def test_a_receiver_that_is_down_for_good_is_given_up_and_said_so(store, receiver, caplog):
    receiver.answers = [500, 500]
    raise_alarm(store)
    delivery = sender(store, channel(receiver), max_attempts=2)
    assert delivery.deliver() == {"pending": 1}
    make_due(store)
    assert delivery.deliver() == {"failed": 1}
    assert "given up" in caplog.records[-1].getMessage()
    assert states(store) == {"a": {"ops": "failed"}}
    make_due(store)
    assert delivery.deliver() == {} and len(receiver.received) == 2


def test_an_alarm_that_became_too_old_is_given_up(store, receiver):
    receiver.answers = [500, 500]
    raise_alarm(store)
    assert sender(store, channel(receiver)).deliver() == {"pending": 1}
    make_due(store)
    with store.writing() as connection:
        connection.execute(sql.text("UPDATE alarms SET raised_at = raised_at - 7200000000"))
    assert sender(store, channel(receiver), max_age_h=1).deliver() == {"failed": 1}


def test_one_receiver_that_hangs_keeps_no_other_waiting(store, receiver):
    with webhook_receiver("hang") as hanging:
        raise_alarm(store)
        delivery = sender(store, channel(hanging, "slow"), channel(receiver), timeout_s=3)
        thread = threading.Thread(target=delivery.deliver)
        thread.start()
        receiver.wait()
        # Also while one of its own messages hangs, the database takes writes.
        raise_alarm(store, "b")
        assert thread.is_alive()
        thread.join(WAIT_S)
        assert states(store)["a"] == {"ops": "sent", "slow": "pending"}


def test_two_senders_at_once_send_once(store, receiver):
    for index in range(5):
        raise_alarm(store, str(index))
    threads = [threading.Thread(target=sender(store, channel(receiver)).deliver) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(receiver.received) == 1 and receiver.received[0].content["data"]["count"] == 5


KILLED = """
import sys
from monitoring.alarm_channels import AlarmChannel, AlarmDeliverySettings
from monitoring.alarm_delivery import AlarmDelivery
from store.database import open_store
channel = AlarmChannel(name="ops", url=sys.argv[2], secret_env="SECRET")
AlarmDelivery(open_store(sys.argv[1]), AlarmDeliverySettings(channels=[channel], timeout_s=60)).deliver()
"""


def test_a_sender_that_is_killed_in_between_loses_nothing_and_repeats_the_id(any_store_url, store):
    with webhook_receiver("hang") as receiver:
        raise_alarm(store, "a")
        raise_alarm(store, "b")
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO_ROOT)}
        process = subprocess.Popen([sys.executable, "-c", KILLED, any_store_url, receiver.url], env=environment)
        try:
            receiver.wait()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT_S)
        raise_alarm(store, "c")
        delivery = sender(store, channel(receiver))
        assert delivery.deliver() == {}, "its lease holds"
        make_due(store)
        assert delivery.deliver() == {"sent": 2}
        assert delivery.deliver() == {"sent": 1}
        first, second, third = receiver.received
        assert first.id == second.id != third.id and first.body == second.body


def test_without_its_secret_a_process_leaves_the_alarms_to_others(store, receiver, caplog):
    bare = sender(store, channel(receiver), environment={})
    assert bare.deliver() == {} and caplog.records == []
    raise_alarm(store)
    assert bare.deliver() == {} and receiver.received == []
    assert "channel ops: the environment variable SECRET is not set" in caplog.records[-1].getMessage()
    # It costs no attempt, and no time.
    assert bare.deliver_for(3600, sleep=None) == {}
    assert sender(store, channel(receiver), max_attempts=1).deliver() == {"sent": 1}


def test_a_url_that_is_a_secret_comes_from_the_environment_and_is_checked_too(store, receiver, caplog):
    raise_alarm(store)
    hidden = AlarmChannel(name="chat", url_env="URL", format="text")
    assert sender(store, hidden, environment={"URL": "http://chat.example/T0/hush"}).deliver() == {}
    line = caplog.records[-1].getMessage()
    assert "expected https, or allow_http: true" in line and "hush" not in line
    assert sender(store, hidden, environment={"URL": receiver.url}).deliver() == {"sent": 1}


def test_a_job_waits_for_a_receiver_that_is_away_for_a_moment(store, receiver):
    receiver.answers = [503, 503]
    raise_alarm(store)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        make_due(store)

    assert sender(store, channel(receiver)).deliver_for(60, sleep) == {"sent": 1}
    assert len(slept) == 2 and len(set(receiver.ids)) == 1


def test_a_job_does_not_wait_longer_than_it_may(store, receiver):
    receiver.answers = [(503, {"retry-after": "600"})]
    raise_alarm(store)
    delivery = sender(store, channel(receiver))
    assert delivery.deliver_for(60, sleep=None) == {"pending": 1}
    assert len(receiver.received) == 1
    make_due(store)
    assert delivery.deliver_for(0, sleep=None) == {"sent": 1}


def test_waits_double_up_to_an_hour_and_longer_where_the_receiver_asks():
    for attempt, longest in ((1, 10), (2, 20), (5, 160), (20, 3600), (1000, 3600)):
        waits = [wait_after(attempt) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert wait_after(1, 900.0) == 900
    assert wait_after(1, 1e9) == 3600
    assert wait_after(20, 1.0) >= 1800


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "http://hooks.example/a"}, "expected https, or allow_http: true"),
        ({"url": "ftp://hooks.example/a"}, "expected https://HOST"),
        ({"url": "https:///a"}, "expected https://HOST"),
        ({"url": "https://hooks.example:x/"}, "the URL of a webhook is none"),
        ({"url": "https://user:pass@hooks.example/a"}, "holds a password"),
        ({"url": None}, "one of url and url_env"),
        ({"url_env": "URL"}, "one of url and url_env"),
        ({"secret_env": None}, "format json is signed; expected secret_env"),
        ({"name": "Ops Team"}, "name"),
        ({"min_severity": "loud"}, "min_severity"),
    ],
)
def test_a_channel_that_cannot_work_is_refused_in_one_line(values, message):
    good = {"name": "ops", "url": "https://hooks.example/a", "secret_env": "SECRET"}
    AlarmChannel(**good)
    with pytest.raises(ValidationError, match=message):
        AlarmChannel(**{**good, **values})


def test_http_is_for_this_machine_or_where_it_is_allowed():
    for url in ("http://127.0.0.1:8000/", "http://localhost/a", "http://[::1]:1/"):
        AlarmChannel(name="ops", url=url, secret_env="S")
    AlarmChannel(name="ops", url="http://hooks.internal/", secret_env="S", allow_http=True)


def test_two_channels_of_one_name_are_refused():
    one = {"name": "ops", "url": "https://hooks.example/a", "secret_env": "S"}
    with pytest.raises(ValidationError, match="ops is there twice"):
        AlarmDeliverySettings(channels=[one, one])


def test_settings_travel_as_json():
    before = settings(AlarmChannel(name="ops", url_env="URL", format="text", kinds=["drift"]))
    assert AlarmDeliverySettings.model_validate(json.loads(before.model_dump_json())) == before
