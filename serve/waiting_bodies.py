"""Bodies of requests that wait outside: read whole before a place is given, counted while they are held, bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from serve.errors import ApiError
from serve.settings import AdmissionSettings

# A body that comes byte by byte is kept in pieces of this size: an object for each byte would take fifty.
_PIECE_BYTES = 64 * 2**10


class Body:
    """One request's body."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._pieces: deque[bytes] = deque()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        if not self._tail and len(data) >= _PIECE_BYTES:
            self._pieces.append(data)
            return
        self._tail += data
        if len(self._tail) >= _PIECE_BYTES:
            self.end()

    def end(self) -> None:
        """What was added last becomes a piece."""
        if self._tail:
            self._pieces.append(bytes(self._tail))
            self._tail.clear()

    def replayed(self, receive: Receive) -> Receive:
        """A `receive` that gives the body, letting go of each piece, and then what `receive` gives."""
        ended = False

        async def replay() -> Message:
            nonlocal ended
            if ended:
                return await receive()
            piece = self._pieces.popleft() if self._pieces else b""
            ended = not self._pieces
            if not ended:
                # A parser that never waits would keep the event loop for the whole of a large body.
                await asyncio.sleep(0)
            return {"type": "http.request", "body": piece, "more_body": not ended}

        return replay


class WaitingBodies:
    """Reads bodies, and counts the bytes of those that were read and not released.

    Serve takes whatever a client sends into memory at once, long before an application asks for it and without a bound
    (the tasks `_fetch_until_disconnect` in its replica.py and `proxy_asgi_receive` in its proxy.py fill queues that
    have no size), with HAProxy and without. Reading on while a request waits costs no memory that is not
    taken already, and is what lets this class, and `BodyLimit` around it, set the bound.

    Args:
        refusal: makes the 503 of a reason.
    """

    def __init__(self, settings: AdmissionSettings, refusal: Callable[[str], ApiError]):
        self._settings = settings
        self._refusal = refusal
        self.num_uploads = 0
        self.num_bytes = 0

    async def read(self, receive: Receive, expected: int) -> Body:
        """Reads a body to its end; `release` must follow.

        Args:
            expected: how long it is, or the longest that it may be, bytes.

        Raises:
            ApiError: 503, there is no room for it; the body was not read to its end.
            HTTPException: 400, the client went away; what `receive` raises.
        """
        if self.num_uploads >= self._settings.max_uploads:
            raise self._refusal(f"{self.num_uploads} bodies are on their way already (max_uploads)")
        self._check_room(expected, others=self.num_bytes)
        body = Body()
        self.num_uploads += 1
        try:
            await self._read_into(body, receive)
        except BaseException:
            self.release(body)
            raise
        finally:
            self.num_uploads -= 1
        return body

    def release(self, body: Body) -> None:
        """The request is inside, or has been refused."""
        self.num_bytes -= body.num_bytes

    async def _read_into(self, body: Body, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise HTTPException(400, "request body: the connection ended before it")
            data = message.get("body", b"")
            body.add(data)
            self.num_bytes += len(data)
            if not message.get("more_body", False):
                body.end()
                return
            self._check_room(body.num_bytes, others=self.num_bytes - body.num_bytes)

    def _check_room(self, num_bytes: int, others: int) -> None:
        # One that is alone is read whatever its length: the limits of its route hold it.
        if others and others + num_bytes > self._settings.max_waiting_bytes:
            raise self._refusal(f"bodies that wait hold {others} bytes, and this one {num_bytes} (max_waiting_bytes)")
