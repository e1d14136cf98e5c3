"""Past traffic sent again: requests that say when they were first received, to a service that was told to take them.

A replay fills the log of past days, for drift checks and drills. The time decides to which day a record belongs and
whether an erasure came after it, so it is the administrators' alone, and off unless a deploy turns it on.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.access import caller_of, refuse
from serve.api import REPLAYED_AT
from serve.arrival import count_as_received_at, received_at
from serve.errors import ApiError, invalid_field
from serve.lesion import parse_time

_HEADER = REPLAYED_AT.lower().encode()


class Replays:
    """Takes the time of a replayed request for the time of its arrival; stands inside the access guard.

    Refuses the header with 403 (the service takes no replays, or not this caller's) and 422 (no time of the past): a
    replay that was logged as of today would be worse than none.

    Args:
        accepted: whether the service takes replays.
    """

    def __init__(self, app: ASGIApp, accepted: bool):
        self.app = app
        self._accepted = accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == _HEADER), None)
            if given is not None:
                try:
                    count_as_received_at(scope, self._moment(Request(scope), given))
                except ApiError as error:
                    await refuse(error, scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _moment(self, request: Request, given: bytes) -> int:
        if not self._accepted:
            raise ApiError(
                403, "forbidden", f"{REPLAYED_AT}: this service takes no replays; deploy it with ingress.accept_replays"
            )
        if not caller_of(request).may("admin"):
            raise ApiError(403, "forbidden", f"{REPLAYED_AT}: replays need the role admin")
        moment = parse_time(given.decode("latin-1"), REPLAYED_AT)
        if moment is None or moment > received_at(request):
            raise invalid_field(f"{REPLAYED_AT}: {given.decode('latin-1')!r}; expected a time of the past")
        return moment
