"""A webhook is signed as Standard Webhooks says, ends in time, and every failure is an answer."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import time

import pytest

from monitoring.webhook import parse_secrets, post, signed_headers
from tests.webhook_receiver import webhook_receiver

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KEYS = parse_secrets(SECRET)


def send(url: str, timeout_s: float = 10):
    return asyncio.run(post(url, "msg_1", b'{"a": 1}', KEYS, timeout_s))


def test_the_signature_is_the_one_of_the_schemes_own_libraries():
    """The vector of their test suites."""
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', KEYS)
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_while_a_secret_is_replaced_both_sign():
    keys = parse_secrets(f"{SECRET} whsec_{'A' * 32}")
    first, second = signed_headers("m", 1, b"", keys)["webhook-signature"].split()
    assert first == signed_headers("m", 1, b"", keys[:1])["webhook-signature"]
    assert second == signed_headers("m", 1, b"", keys[1:])["webhook-signature"]


def test_without_a_secret_there_is_no_signature():
    assert set(signed_headers("m", 1, b"", [])) == {"webhook-id", "webhook-timestamp"}


@pytest.mark.parametrize("text", ["", " ", SECRET.removeprefix("whsec_"), "whsec_short", "whsec_!!!", "whsec_Zm9v"])
def test_a_secret_that_is_none_is_refused_and_not_told(text):
    with pytest.raises(ValueError, match="signing secret") as error:
        parse_secrets(text)
    assert not text.strip() or text not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (200, None),
        (204, None),
        (500, "answered 500"),
        (400, "answered 400"),
        ((302, {"location": "http://127.0.0.1:9/"}), "answered 302, a redirect, which is not followed"),
    ],
)
def test_only_2xx_is_taken_and_no_redirect_is_followed(answer, error):
    with webhook_receiver(answer) as receiver:
        assert send(receiver.url).error == error
        assert [(request.path, request.body) for request in receiver.received] == [("/alarms", b'{"a": 1}')]
        assert receiver.received[0].headers["content-type"] == "application/json"


def test_retry_after_is_read_as_seconds_or_as_a_date():
    def asked(value):
        with webhook_receiver((429, {"retry-after": value})) as receiver:
            return send(receiver.url).retry_after_s

    assert asked("120") == 120
    assert 50 < asked(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 61
    assert asked("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert [asked(value) for value in ("soon", "nan", "inf")] == [None] * 3


@pytest.mark.parametrize("answer", ["hang", "trickle"])
def test_a_receiver_that_never_ends_its_answer_is_left_in_time(answer):
    with webhook_receiver(answer) as receiver:
        start = time.monotonic()
        assert send(receiver.url, 0.5).error == "no answer within 0.5 s"
        assert time.monotonic() - start < 20


def test_a_closed_connection_and_a_closed_port_are_answers_without_the_url():
    with webhook_receiver("close") as receiver:
        assert "disconnected" in send(receiver.url).error
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/services/T0/secret"
    error = send(url).error
    assert error.startswith("Connect") and "secret" not in error
