"""When a request came in, before it waits at the door and before its form is read."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from store.tables import now_us

_SCOPE_KEY = "dermray.received_at"


class ArrivalTime:
    """Notes it in the request's scope; stands outside of all that may take its time."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, _SCOPE_KEY: now_us()} if scope["type"] == "http" else scope, receive, send)


def received_at(request: Request) -> int:
    """When the request came in, microseconds since the epoch, UTC; of a replayed one, when it first did."""
    return request.scope[_SCOPE_KEY]


def count_as_received_at(scope: Scope, moment: int) -> None:
    """Sets what `received_at` says of this request."""
    scope[_SCOPE_KEY] = moment
