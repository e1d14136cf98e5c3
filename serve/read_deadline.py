"""Around all routes: a body that comes too slowly is not waited for."""

from __future__ import annotations

import asyncio
import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ReadDeadline:
    """Ends a request whose body pauses, or comes in a trickle: 408 with {error, detail}, and the connection is closed.

    Nobody else ends it: HAProxy streams bodies through and waits for the next byte as long as
    `RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S` says (an hour by default), uvicorn and Serve for ever. Only time spent waiting
    for the client counts, so that a busy service blames nobody else.

    Args:
        max_pause_s: longest wait for the next piece of a body.
        min_bytes_per_s: what a body must bring on the average once `max_pause_s` has been waited in all. N bytes are
            thus waited for `max_pause_s` + N / `min_bytes_per_s` at most, and a trickle is cut off long before that.
    """

    def __init__(self, app: ASGIApp, max_pause_s: float, min_bytes_per_s: float):
        self.app = app
        self.max_pause_s = max_pause_s
        self.min_bytes_per_s = min_bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        waited_s, received, ended = 0.0, 0, False

        async def timed() -> Message:
            nonlocal waited_s, received, ended
            if ended:
                # What comes now is the end of the connection, which may take as long as the answer.
                return await receive()
            left_s = self.max_pause_s + min(0.0, received / self.min_bytes_per_s - waited_s)
            began = time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    message = await receive()
            except TimeoutError:
                waited_s += time.monotonic() - began
                # FastAPI turns any other exception that ends its form parser into 400.
                raise HTTPException(408, self._reason(received, waited_s), {"Connection": "close"}) from None
            waited_s += time.monotonic() - began
            received += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            return message

        await self.app(scope, timed, send)

    def _reason(self, received: int, waited_s: float) -> str:
        return (
            f"request body: {received} bytes in {waited_s:.3g} s of waiting; expected no pause of "
            f"{self.max_pause_s:g} s, and {self.min_bytes_per_s:g} bytes/s after so long"
        )
