"""Whether a request is let in: what cannot be answered in time, or would not fit into memory, is refused at the door.

The sign of overload is the wait of the picture that is next for the network, not a number of requests: it means the
same whatever the engine, the number of replicas and the size of the pictures. A queue that is served in order and
refuses by the age of its oldest member lets in as many as are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import ApiError, unavailable
from serve.http_errors import problem_response
from serve.middleware import drain
from serve.settings import AdmissionSettings


class Admission:
    """Counts what is inside, and says no.

    Args:
        oldest_wait_s: for how long the picture that is next has waited for the network, seconds.
        retry_after_s: what a refusal tells the client.
    """

    def __init__(self, settings: AdmissionSettings, oldest_wait_s: Callable[[], float], retry_after_s: int):
        self._settings = settings
        self._oldest_wait_s = oldest_wait_s
        self._retry_after_s = retry_after_s
        self.num_requests = 0
        self.num_bytes = 0
        self.num_refused = 0

    def refusal(self, num_bytes: int) -> ApiError | None:
        """Why a request with a body of so many bytes is not let in now; None where it is."""
        settings, reason = self._settings, None
        if self.num_requests >= settings.max_requests:
            reason = f"{self.num_requests} requests are under way, as many as max_requests allows"
        # A request that is alone is let in whatever its size: the limits of its route hold it.
        elif self.num_requests and self.num_bytes + num_bytes > settings.max_bytes:
            reason = f"{self.num_bytes} bytes of requests are under way; {num_bytes} more pass max_bytes"
        elif (wait := self._oldest_wait_s()) > settings.max_wait_s:
            reason = f"pictures wait {wait:.2g} s for the network, longer than max_wait_s"
        if reason is None:
            return None
        self.num_refused += 1
        return unavailable(f"the service is full: {reason}", self._retry_after_s)


class AdmissionGuard:
    """Asks `Admission` before the body of a request that needs the network is read.

    Args:
        paths: of the routes that do; every other route is let in.
        largest_body: what a request weighs that does not announce its length, bytes.
    """

    def __init__(self, app: ASGIApp, admission: Admission, paths: Collection[str], largest_body: int):
        self.app = app
        self.admission = admission
        self.paths = frozenset(paths)
        self.largest_body = largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self.paths or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        num_bytes = min(int(announced), self.largest_body) if announced.isdecimal() else self.largest_body
        refusal = self.admission.refusal(num_bytes)
        if refusal is not None:
            await drain(receive)
            await problem_response(refusal)(scope, receive, send)
            return
        self.admission.num_requests += 1
        self.admission.num_bytes += num_bytes
        try:
            await self.app(scope, receive, send)
        finally:
            self.admission.num_requests -= 1
            self.admission.num_bytes -= num_bytes
