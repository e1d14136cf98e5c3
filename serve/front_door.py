"""A door that stands ahead of Serve: who needs the network waits, and is refused, before Serve has handled the request.

A service that is offered twice what it can answer refuses every second request, and pays for each in answers. Serve's
own handling (two tasks, metadata, a line of the log, figures) was the larger part of what a refusal cost.
`http_middlewares` stands around Serve in the HTTP server of every ingress replica, where the replica opens its door.
Requests that come another way, such as through Serve's own proxy, find the same door inside the application.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import Callable, Collection

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.request_ids import LOGGER, MAX_IDS, RequestIds, current_ids, join_ids, working_for

_SCOPE_KEY = "dermray.visit"
# Between two lines of the log.
_LOG_S = 1.0

logger = logging.getLogger(LOGGER)


class _Visit:
    """A request that came to the door ahead of Serve, and whether it was let in."""

    __slots__ = ("door", "let_in")

    def __init__(self, door: Door):
        self.door = door
        self.let_in = False


class Door:
    """The guards that a request passes once, ahead of Serve or inside the application.

    Args:
        guard: stands the guards around an application. They must read the body of what they let in to its end: an error
            of theirs that ends the reading would not get through Serve.
        paths: whose POST requests pass ahead of Serve.
    """

    def __init__(self, guard: Callable[[ASGIApp], ASGIApp], paths: Collection[str]):
        self._guard = guard
        self._paths = frozenset(paths)

    def inside(self, app: ASGIApp) -> ASGIApp:
        """The application, guarded against requests that were not let in ahead of Serve."""
        guarded = self._guard(app)

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            visit = scope.get(_SCOPE_KEY)
            passed = isinstance(visit, _Visit) and visit.door is self and visit.let_in
            await (app if passed else guarded)(scope, receive, send)

        return call

    def ahead(self, app: ASGIApp) -> ASGIApp:
        """Serve's handling, guarded; the log says what it never sees."""

        async def let_in(scope: Scope, receive: Receive, send: Send) -> None:
            scope[_SCOPE_KEY].let_in = True
            await app(scope, receive, send)

        guarded, turned_away = self._guard(let_in), _TurnedAway()

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
                await app(scope, receive, send)
                return
            visit = _Visit(self)

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start" and not visit.let_in:
                    turned_away.add(scope["path"], message["status"])
                await send(message)

            await guarded({**scope, _SCOPE_KEY: visit}, receive, noted)

        return call


class _TurnedAway:
    """One line of the log a second, at most, for all that the door answered itself; a line for each costs 0.1 ms."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int]] = Counter()
        self._ids: list[tuple[str, ...]] = []

    def add(self, path: str, status: int) -> None:
        if not self._counts:
            # An empty context: the line is not that of the first request.
            asyncio.get_running_loop().call_later(_LOG_S, self._log, context=contextvars.Context())
        self._counts[path, status] += 1
        # One more than are shown, so that the line says that there are more.
        if len(self._ids) <= MAX_IDS:
            self._ids.append(current_ids())

    def _log(self) -> None:
        counts = ", ".join(f"{path} {status}: {n}" for (path, status), n in sorted(self._counts.items()))
        with working_for(join_ids(self._ids)):
            logger.info("answered at the door: %s", counts)
        self._counts.clear()
        self._ids.clear()


_door: Door | None = None


def open_front_door(door: Door) -> None:
    """From now on requests to this process's HTTP server pass this door ahead of Serve."""
    global _door
    _door = door


class FrontDoor:
    """Around Serve's handling of requests; lets everyone pass until there is a door."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._door: Door | None = None
        self._guarded = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._door is not _door:
            self._door = _door
            self._guarded = self._app if _door is None else _door.ahead(self._app)
        await self._guarded(scope, receive, send)


def http_middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names; the last one stands outermost."""
    return [Middleware(FrontDoor), Middleware(RequestIds)]
