"""Sends HTTP requests that were made beforehand, in a closed loop or at a fixed rate, and notes what came back.

A raw protocol on asyncio: the generator shares the cores with the server, and an HTTP client library costs several
times as much CPU per request as this does.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

_ID_START = b'"prediction_id":"'
# A connection that is refused or broken is made again after this; users do not hammer a closed door.
_RECONNECT_S = 0.1
_ANSWER_TIMEOUT_S = 120.0


@dataclass
class Tally:
    """What came back in one measurement.

    Attributes:
        statuses: answers by HTTP status; 0 = the connection broke.
        latencies: seconds of each answer with 200. In an open loop from the moment it was due.
        answered_at: `time.perf_counter()` of each of these answers.
        prediction_ids: of all answers with 200.
        seconds: of the whole measurement; of an open loop, while requests were due or answered.
        retry_after: answers with 503 or 429 that said when to come back.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)
    prediction_ids: list[str] = field(default_factory=list)
    seconds: float = 0.0
    retry_after: int = 0

    @property
    def answered(self) -> int:
        return self.statuses[200]

    @property
    def refused(self) -> int:
        """Orderly refusals: 503 or 429 with Retry-After."""
        return self.retry_after

    @property
    def errors(self) -> int:
        """Everything else."""
        return sum(self.statuses.values()) - self.answered - self.refused

    def figures(self) -> dict[str, float]:
        """rps of answers with 200; p50_ms, p95_ms, p99_ms of these; refused; errors."""
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99]) * 1e3 if self.latencies else (float("nan"),) * 3
        return {
            "rps": self.answered / self.seconds,
            "p50_ms": float(p50),
            "p95_ms": float(p95),
            "p99_ms": float(p99),
            "refused": self.refused,
            "errors": self.errors,
        }


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head_end = -1
        self._length = 0
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionResetError("closed before the answer"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._head_end < 0:
            self._head_end = self._buffer.find(b"\r\n\r\n")
            if self._head_end < 0:
                return
            head = bytes(self._buffer[: self._head_end]).lower()
            start = head.find(b"content-length:")
            if start < 0:
                raise ValueError("an answer without Content-Length; the generator reads no other")
            self._length = int(head[start + 15 :].split(b"\r\n", 1)[0])
        end = self._head_end + 4 + self._length
        if len(self._buffer) < end:
            return
        head, body = bytes(self._buffer[: self._head_end]), bytes(self._buffer[self._head_end + 4 : end])
        self._buffer.clear()
        self._head_end = -1
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((int(head[9:12]), head, body))

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """(status, head, body) of one request."""
        if self.transport is None:
            raise ConnectionResetError("not connected")
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await asyncio.wait_for(self.answer, _ANSWER_TIMEOUT_S)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


# A JPEG's first quantisation table, 8 bit: its last entries scale the highest frequencies, which hardly any tile has.
_TABLE = b"\xff\xdb\x00\x43\x00"
_TABLE_END, _STAMP_BYTES, _STAMP_BASE = len(_TABLE) + 64, 4, 255
# Of all generators of a process, from a number on that no process before this one reached.
_stamps = itertools.count(time.time_ns() // 1000)


def _tables_end(request: bytes) -> list[int]:
    """Where the last entries of each picture's first table are."""
    return [found.start() + _TABLE_END - _STAMP_BYTES for found in re.finditer(re.escape(_TABLE), request)]


def _restamped(request: bytes, places: list[int]) -> bytes:
    """The request with pictures that were never sent before: another last entry or four in each one's table."""
    stamped = bytearray(request)
    for place in places:
        number = next(_stamps)
        for offset in range(_STAMP_BYTES):
            number, digit = divmod(number, _STAMP_BASE)
            stamped[place + offset] = digit + 1
    return bytes(stamped)


class LoadGenerator:
    """Sends `requests` (bytes as they go over the wire), each in turn, to one server.

    Its JPEGs differ a little each time: a server that keeps pictures has to write every one of them.

    Args:
        url: http://host:port.
        requests: made by `http_request`.
    """

    def __init__(self, url: str, requests: Sequence[bytes]):
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port
        self._requests = [(request, _tables_end(request)) for request in requests]
        self._next = 0

    def _take(self) -> bytes:
        self._next += 1
        return _restamped(*self._requests[self._next % len(self._requests)])

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    async def _ask(self, connection: _Connection | None, tally: Tally, started: float) -> _Connection | None:
        """Sends the next request, notes what came of it, and returns the connection while it is usable."""
        try:
            connection = connection or await self._connect()
            status, head, body = await connection.ask(self._take())
        except (OSError, TimeoutError):
            tally.statuses[0] += 1
            if connection is not None:
                connection.close()
            await asyncio.sleep(_RECONNECT_S)
            return None
        tally.statuses[status] += 1
        head = head.lower()
        if status == 200:
            tally.answered_at.append(time.perf_counter())
            tally.latencies.append(tally.answered_at[-1] - started)
            at = body.find(_ID_START)
            if at >= 0:
                tally.prediction_ids.append(body[at + len(_ID_START) : at + len(_ID_START) + 32].decode())
        elif status in (429, 503) and b"\nretry-after:" in head:
            tally.retry_after += 1
        if b"\nconnection: close" in head:
            connection.close()
            return None
        return connection

    async def closed_loop(
        self, clients: int, requests: int = 0, seconds: float = 0.0, until: asyncio.Event | None = None
    ) -> Tally:
        """`clients` users, each of which sends its next request when the last is answered, whatever the answer.

        Ends after `requests` requests, `seconds`, or when `until` is set, whichever is given.
        """
        tally = Tally()
        left = requests
        started = time.perf_counter()

        def goes_on() -> bool:
            if until is not None:
                return not until.is_set()
            return left > 0 if requests else time.perf_counter() - started < seconds

        async def user() -> None:
            nonlocal left
            connection = None
            while goes_on():
                left -= 1
                connection = await self._ask(connection, tally, time.perf_counter())
            if connection is not None:
                connection.close()

        await asyncio.gather(*(user() for _ in range(clients)))
        tally.seconds = time.perf_counter() - started
        return tally

    async def open_loop(self, rate: float, seconds: float, seed: int = 0, connections: int = 2000) -> Tally:
        """Requests at Poisson times, `rate` a second on average, whatever the server does.

        Latencies count from the time a request was due, so that a generator that falls behind hides nothing.

        Raises:
            RuntimeError: more than `connections` requests were under way: the server neither answers nor refuses.
        """
        tally = Tally()
        idle: list[_Connection | None] = []
        tasks: set[asyncio.Task[None]] = set()
        started = time.perf_counter()
        due = started + np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds)))

        async def send(moment: float) -> None:
            connection = idle.pop() if idle else None
            idle.append(await self._ask(connection, tally, moment))

        for moment in due:
            while (wait := moment - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if len(tasks) >= connections:
                raise RuntimeError(f"{connections} requests are under way; the server neither answers nor refuses")
            task = asyncio.create_task(send(float(moment)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        offered = time.perf_counter()
        await asyncio.gather(*tasks)
        # Not until the last refusal, which a server may hold back: nothing more was asked of it.
        tally.seconds = max([offered, *tally.answered_at[-1:]]) - started
        for connection in idle:
            if connection is not None:
                connection.close()
        return tally


def http_request(url: str, path: str, body: bytes, content_type: str, headers: str = "") -> bytes:
    """A POST as it goes over the wire; `headers`: further lines, each with its CRLF."""
    host = urlsplit(url).netloc
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    ).encode() + body


def run_on_uvloop(make: Callable[[], Awaitable[Tally]]) -> Tally:
    """Runs a measurement on uvloop, with half the CPU time of asyncio's own loop."""
    import uvloop

    async def main() -> Tally:
        return await make()

    return uvloop.run(main())
