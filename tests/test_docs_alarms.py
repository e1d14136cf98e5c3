"""What docs/alarms.md tells people to copy works."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
import yaml

from monitoring.alarm_channels import AlarmDeliverySettings, JobAlarmSettings, ServiceAlarmSettings
from monitoring.alarm_messages import message_body
from monitoring.webhook import parse_secrets, post, signed_headers
from store.alarm_deliveries import Delivery
from tests.webhook_receiver import webhook_receiver

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "alarms.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture(scope="module")
def verify():
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "def verify" in text]
    names: dict = {}
    exec(code, names)
    return names["verify"]


def test_a_receiver_that_copies_the_lines_accepts_what_is_sent(verify):
    with webhook_receiver() as receiver:
        keys = parse_secrets(f"whsec_{'A' * 32} {SECRET}")
        assert asyncio.run(post(receiver.url, "msg_1", '{"a": "é"}'.encode(), keys, 10)).error is None
        (request,) = receiver.received
    assert verify(request.headers, request.body, SECRET) == "msg_1"
    with pytest.raises(ValueError, match="signature"):
        verify(request.headers, request.body + b" ", SECRET)
    with pytest.raises(ValueError, match="signature"):
        verify({**request.headers, "webhook-id": "msg_2"}, request.body, SECRET)
    with pytest.raises(ValueError, match="signature"):
        verify(request.headers, request.body, "whsec_" + "B" * 32)
    with pytest.raises(ValueError, match="signature"):
        verify({**request.headers, "webhook-signature": "v1,é"}, request.body, SECRET)


def test_a_message_of_before_is_refused(verify):
    headers = signed_headers("m", 1_700_000_000, b"{}", parse_secrets(SECRET))
    assert verify(headers, b"{}", SECRET, now=1_700_000_200) == "m"
    for now in (1_700_000_301, 1_699_999_699):
        with pytest.raises(ValueError, match="not of now"):
            verify(headers, b"{}", SECRET, now=now)


def test_the_config_of_the_page_is_accepted_and_its_numbers_are_the_defaults():
    (block,) = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    channels = AlarmDeliverySettings.model_validate(block["alarms"]).channels
    assert [channel.name for channel in channels] == ["oncall", "chat"]
    assert f"`message_gap_s` ({ServiceAlarmSettings().message_gap_s:g})" in PAGE
    assert JobAlarmSettings().cool_down_h == 7 * 24
    assert AlarmDeliverySettings().timeout_s == 10


def test_the_message_of_the_page_is_what_is_sent():
    (shown,) = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    (told,) = shown["data"]["alarms"]
    columns = ("id", "kind", "severity", "model_version", "topic", "message", "detail")
    row = {**{name: told[name] for name in columns}, "raised_at": 1_795_316_412_345_000}
    sent = json.loads(message_body(Delivery("oncall", (row,), 1, 0), "json"))
    for moment in (told["raised_at"], shown["timestamp"]):
        assert moment == "2026-11-22T03:00:12.345+00:00"
    assert sent == shown
