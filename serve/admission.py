"""Whether a request is let in: what cannot be answered in time, or would not fit into memory, is refused at the door.

So many requests are inside as keep the network busy; the others wait outside, unparsed, in the order in which they
came, for a moment that a person would hardly notice, and are refused after it. A refusal is held back: users that come
back at once would otherwise take the CPU from those who are inside (300 users on two cores: 590 refusals a second left
119 answers a second of 188). A body is read outside, so that a place is taken only by what can be worked on.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import ApiError, unavailable
from serve.http_errors import http_problem_response, problem_response
from serve.middleware import drain
from serve.settings import AdmissionSettings
from serve.waiting_bodies import Body, WaitingBodies

# The door may open while nobody leaves, since the picture that is next was sent to the network. Nobody tells, so
# somebody has to look, as long as there is a line.
_LOOK_S = 0.02
# Of the patience.
_LATE = 0.75


@dataclass(frozen=True, slots=True)
class _Place:
    """One request outside.

    Attributes:
        since: when it came, `time.monotonic()`.
        turn: True when it is let in, False when its refusal is to be sent.
    """

    num_bytes: int
    since: float
    turn: asyncio.Future[bool]


class Admission:
    """Counts what is inside, and keeps the line outside.

    One timer looks after all who wait: with a timer and a guarded wait for each, a refusal cost a quarter more CPU.

    Args:
        oldest_wait_s: for how long the picture that is next has waited for the network, seconds.
        retry_after_s: what a refusal tells the client.
    """

    def __init__(self, settings: AdmissionSettings, oldest_wait_s: Callable[[], float], retry_after_s: int):
        self._settings = settings
        self._oldest_wait_s = oldest_wait_s
        self._retry_after_s = retry_after_s
        # Both in the order in which they came.
        self._line: deque[_Place] = deque()
        self._given_up: deque[_Place] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._held = 0
        self.num_requests = 0
        self.num_bytes = 0
        self.num_refused = 0

    @property
    def num_waiting(self) -> int:
        """Requests outside: in line, or held back until their refusal."""
        return self._held

    async def enter(self, num_bytes: int) -> bool:
        """Returns once a request with a body of so many bytes may come in, and whether it waited; `leave` must follow.

        Raises:
            ApiError: 503, it may not.
        """
        self._call_next()
        if not self._line and self._has_room(num_bytes):
            self._let_in(num_bytes)
            return False
        if self._held >= self._settings.max_waiting:
            raise self.refusal(f"{self._held} requests wait already (max_waiting)")
        place = _Place(num_bytes, time.monotonic(), asyncio.get_running_loop().create_future())
        self._line.append(place)
        self._held += 1
        self._look_again()
        try:
            called = await place.turn
        except BaseException:
            # Called in the moment in which it broke off: the place goes to the next one.
            if place.turn.done() and not place.turn.cancelled() and place.turn.result():
                self.leave(num_bytes)
            raise
        finally:
            self._held -= 1
        if not called:
            raise self.refusal(f"no place in {self._settings.patience_s:g} s")
        return True

    def leave(self, num_bytes: int) -> None:
        """The request has its answer, or broke off."""
        self.num_requests -= 1
        self.num_bytes -= num_bytes
        self._call_next()

    def refusal(self, reason: str) -> ApiError:
        """Counts a refusal, and gives the 503 for it."""
        self.num_refused += 1
        return unavailable(f"the service is full: {reason}", self._retry_after_s)

    def _call_next(self) -> None:
        while self._line:
            # Who came first goes in first, until that means that everyone who goes in has waited almost as long as one
            # may: then who came last does, and the others, who would be answered late, are refused.
            late = time.monotonic() - self._line[0].since > _LATE * self._settings.patience_s
            place = self._line[-1 if late else 0]
            if not place.turn.done():
                if not self._has_room(place.num_bytes):
                    return
                self._let_in(place.num_bytes)
                place.turn.set_result(True)
            if late:
                self._line.pop()
            else:
                self._line.popleft()

    def _look_again(self) -> None:
        if (self._line or self._given_up) and self._timer is None:
            # An empty context, or what Serve knows of the first request in the line would go along with every look.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_LOOK_S, self._on_timer, context=contextvars.Context())

    def _on_timer(self) -> None:
        self._timer = None
        self._call_next()
        now = time.monotonic()
        while self._line and now - self._line[0].since >= self._settings.patience_s:
            self._given_up.append(self._line.popleft())
        while self._given_up and now - self._given_up[0].since >= self._settings.refuse_after_s:
            place = self._given_up.popleft()
            if not place.turn.done():
                place.turn.set_result(False)
        self._look_again()

    def _has_room(self, num_bytes: int) -> bool:
        settings = self._settings
        # A request that is alone is let in whatever its size: the limits of its route hold it.
        return self.num_requests == 0 or (
            self.num_requests < settings.max_requests
            and self.num_bytes + num_bytes <= settings.max_bytes
            and self._oldest_wait_s() <= settings.max_wait_s
        )

    def _let_in(self, num_bytes: int) -> None:
        self.num_requests += 1
        self.num_bytes += num_bytes


class AdmissionGuard:
    """Reads the body of a request that needs the network, and asks `Admission` before the application parses it.

    Args:
        largest: body of each route that needs the network, by path; every other route is let in. It is what a request
            weighs that does not announce its length, until it has come.
    """

    def __init__(self, app: ASGIApp, admission: Admission, bodies: WaitingBodies, largest: Mapping[str, int]):
        self.app = app
        self.admission = admission
        self.bodies = bodies
        self.largest = dict(largest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        largest = None
        if scope["type"] == "http" and scope["method"] == "POST":
            # Starlette's routes overlook a line break at the end.
            largest = self.largest.get(scope["path"].removesuffix("\n"))
        if largest is None:
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        expected = min(int(announced), largest) if announced.isdecimal() else largest
        try:
            body = await self.bodies.read(receive, expected)
        except HTTPException as error:
            # Cut off, or too slow or too long, as the middleware around this one says.
            await http_problem_response(error)(scope, receive, send)
            return
        except ApiError as refusal:
            response = problem_response(refusal)
            if not await drain(receive):
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        await self._let_in(body, scope, receive, send)

    async def _let_in(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            waited = await self.admission.enter(body.num_bytes)
        except ApiError as refusal:
            await problem_response(refusal)(scope, receive, send)
            return
        finally:
            self.bodies.release(body)
        try:
            # Ahead of Serve nobody ends the request of a client that has gone.
            if not waited or not await Request(scope, receive).is_disconnected():
                await self.app(scope, body.replayed(receive), send)
        finally:
            self.admission.leave(body.num_bytes)
