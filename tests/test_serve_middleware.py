"""What happens to a body that is too long, message by message."""

import asyncio

import pytest
from fastapi import HTTPException

from serve import middleware
from serve.middleware import BodyLimit


@pytest.mark.parametrize("announce", [True, False])
@pytest.mark.parametrize(("sent", "read"), [(30, 30), (200, 64)])
def test_an_oversize_body_is_read_before_it_is_refused(announce, sent, read):
    """Closed with bytes unread, a connection is reset before the client has the answer. An endless body has no end."""
    calls, answers = [], []

    async def receive():
        calls.append(1)
        return {"type": "http.request", "body": bytes(2**20), "more_body": len(calls) < sent}

    async def send(message):
        answers.append((len(calls), message))

    async def read_all(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
        except HTTPException as error:
            await send({"type": "http.response.start", "status": error.status_code, "headers": []})

    headers = [(b"content-length", str(sent * 2**20).encode())] if announce else []
    scope = {"type": "http", "path": "/x", "method": "POST", "headers": headers}
    asyncio.run(BodyLimit(read_all, {}, 2**20)(scope, receive, send))
    before, start = answers[0]
    assert start["status"] == 413 and read <= before <= read + 2
    assert len(calls) == before


def test_a_client_that_stops_sending_is_answered_all_the_same(monkeypatch):
    monkeypatch.setattr(middleware, "DRAIN_SECONDS", 0.05)
    answers = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        answers.append(message)

    scope = {"type": "http", "path": "/x", "method": "POST", "headers": [(b"content-length", b"9999")]}
    asyncio.run(BodyLimit(None, {}, 10)(scope, receive, send))
    assert answers[0]["status"] == 413
