"""Around all routes: bodies that are too long are refused, and every answer says what the model is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A connection that is closed with bytes unread is reset, and the reset overtakes the answer: a client that still sends
# then sees a broken connection instead of a 413. So much, and so long, is read and thrown away before answering.
DRAINED_BYTES, DRAIN_SECONDS = 64 * 2**20, 10.0


async def drain(receive: Receive) -> bool:
    """Reads a body until DRAINED_BYTES or DRAIN_SECONDS are over; returns whether it came to its end."""
    drained = 0
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while drained < DRAINED_BYTES:
                message = await receive()
                drained += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    except (TimeoutError, HTTPException):
        # Too slow, or too long, for the middleware around this one: the answer that was meant for it comes first.
        return False
    return False


class BodyLimit:
    """Refuses a body by its announced length or, where none is given, while it arrives: 413 with {error, detail}.

    Starlette's own limit answers an announced length in plain text.

    Args:
        limits: largest body in bytes by path.
        default: the same for every other path.
    """

    def __init__(self, app: ASGIApp, limits: Mapping[str, int], default: int):
        self.app = app
        self.limits = limits
        self.default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"], self.default)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            problem = {"error": "too_large", "detail": f"request body: {announced} bytes; expected at most {limit}"}
            await drain(receive)
            # Of a longer body the rest is not read, so the connection cannot be used again.
            await JSONResponse(problem, 413, {"Connection": "close"})(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                if message.get("more_body", False):
                    await drain(receive)
                # FastAPI turns any other exception that ends its form parser into 400.
                raise HTTPException(413, f"request body: expected at most {limit} bytes")
            return message

        await self.app(scope, counted, send)


class NoticeHeader:
    """Adds a header to every answer.

    Args:
        value: gives the header's text at the time of the answer.
    """

    def __init__(self, app: ASGIApp, name: str, value: Callable[[], str]):
        self.app = app
        self.name = name
        self.value = value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_notice(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[self.name] = self.value()
            await send(message)

        await self.app(scope, receive, send_with_notice if scope["type"] == "http" else send)
