"""Counts every answer that is no success, whoever gave it: a route, a guard, the form parser, an error handler."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import PROBLEMS, Recorder
from serve.recent_problems import RecentProblems

# The codes are our own, but a page's or a library's answer has none.
_CODE = re.compile(r"[a-z_]{1,40}")
# What Serve answers where the client has gone; nobody reads it.
_GONE = 499


class ProblemCounter:
    """Records `PROBLEMS` by route template, status and error code.

    Args:
        routes: of the application; a path that none of them has counts as "other".
        recent: counts them too, for this replica's page.
    """

    def __init__(self, app: ASGIApp, metrics: Recorder, routes: Iterable[BaseRoute], recent: RecentProblems):
        self.app = app
        self._metrics = metrics
        self._recent = recent
        self._paths = [(route.path_regex, route.path) for route in routes if hasattr(route, "path_regex")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status >= 400 and status != _GONE and message["type"] == "http.response.body":
                route = next((path for regex, path in self._paths if regex.match(scope["path"])), "other")
                error = _code(message.get("body", b""))
                self._metrics.record(PROBLEMS, 1, route, str(status), error)
                self._recent.add(status, error)
                status = 0
            await send(message)

        await self.app(scope, receive, counted)


def _code(body: bytes) -> str:
    try:
        code = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "none"
    return code if isinstance(code, str) and _CODE.fullmatch(code) else "none"
