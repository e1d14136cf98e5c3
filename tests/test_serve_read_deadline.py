"""A body that comes too slowly is answered with 408; one that only takes its time is not."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from fastapi import HTTPException

from serve.read_deadline import ReadDeadline
from serve.settings import UploadLimits
from tests.bundle_factory import lesion_image, served_bundle
from tests.hostile_uploads import MULTIPART, form, part
from tests.http_server import http_server
from tests.local_service import LocalService


async def read(chunks, max_pause_s, min_bytes_per_s, between=0.0):
    """What an application got of a body of (seconds, bytes): bytes, or a status; it waits `between` reads."""
    got = 0

    async def body():
        for seconds, size in chunks:
            await asyncio.sleep(seconds)
            yield {"type": "http.request", "body": bytes(size), "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()

    messages = body()

    async def app(scope, receive, send):
        nonlocal got
        more = True
        while more:
            message = await receive()
            got, more = got + len(message["body"]), message["more_body"]
            await asyncio.sleep(between)

    try:
        await ReadDeadline(app, max_pause_s, min_bytes_per_s)({"type": "http"}, messages.__anext__, None)
    except HTTPException as error:
        assert error.headers == {"Connection": "close"}
        assert f"{got} bytes" in error.detail
        return error.status_code
    return got


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([(0, 1000)], 1000),
        # Slow, and fast enough.
        ([(0.02, 200)] * 20, 4000),
        # A trickle, none of whose pauses is too long, is cut off at 0.2 s and not at the length that it announced.
        ([(0.02, 1)] * 1000, 408),
        # Fast at first: the rate would allow ten seconds, one pause is too long.
        ([(0, 10_000), (60, 1)], 408),
        ([(60, 1)], 408),
    ],
)
def test_a_body_needs_a_rate_and_no_long_pause(chunks, expected):
    began = time.monotonic()
    assert asyncio.run(read(chunks, max_pause_s=0.2, min_bytes_per_s=1000)) == expected
    assert time.monotonic() - began < 5


def test_a_busy_service_does_not_blame_the_client():
    async def scenario():
        return await read([(0, 1)] * 10, max_pause_s=0.05, min_bytes_per_s=1e9, between=0.02)

    assert asyncio.run(scenario()) == 10


def test_an_answer_may_take_longer_than_the_body():
    async def app(scope, receive, send):
        assert not (await receive())["more_body"]
        # What comes next is the end of the connection.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await receive()

    async def scenario():
        messages = [{"type": "http.request", "body": b"x", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            return await asyncio.Event().wait()

        await ReadDeadline(app, 0.05, 1000)({"type": "http"}, receive, None)

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deadline")
    (folder / "home").mkdir()
    limits = UploadLimits(max_pause_s=1, min_bytes_per_s=2**20)
    local = LocalService(served_bundle(folder / "bundle"), folder / "home", limits)
    with http_server(local) as url:
        yield url, local


BODY = form(part('name="image"; filename="a.jpg"', lesion_image()))


def connect(url, path, length, kind):
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


def answer(connection):
    """(status, headers, body) of a connection that the server closes."""
    data = b""
    while piece := connection.recv(2**16):
        data += piece
    head, body = data.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), head.lower(), json.loads(body)


@pytest.mark.parametrize(
    ("path", "kind", "sent"),
    [
        ("/v1/predict", MULTIPART, BODY[:100]),
        # A route that asks for no place, and lets FastAPI read the body.
        ("/v1/labels", "application/json", b'{"prediction_id"'),
        ("/v1/labels", "application/json", b""),
    ],
    ids=["a form cut short", "JSON cut short", "no byte"],
)
def test_over_a_socket_a_stalled_upload_gets_408_and_is_closed(server, path, kind, sent):
    url, local = server
    before = len(local.rows())
    with connect(url, path, len(BODY), kind) as connection:
        connection.sendall(sent)
        status, head, problem = answer(connection)
    assert status == 408 and b"connection: close" in head
    assert problem["error"] == "request_timeout" and f"{len(sent)} bytes" in problem["detail"]
    assert len(local.rows()) == before


def test_over_a_socket_an_upload_in_pieces_is_answered(server):
    url, local = server
    before = len(local.rows())
    with connect(url, "/v1/predict", len(BODY), MULTIPART) as connection:
        for at in range(0, len(BODY), 500):
            connection.sendall(BODY[at : at + 500])
            time.sleep(0.001)  # so that they are not sent as one
        data = connection.recv(2**16)
    assert data.startswith(b"HTTP/1.1 200")
    assert len(local.rows()) == before + 1
