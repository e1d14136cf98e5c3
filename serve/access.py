"""Who calls and what they may do: the table of least roles, and the guard around all routes that applies it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api import KEY_HEADER
from serve.errors import ApiError, unavailable
from serve.key_ring import KeyRing
from serve.middleware import drain
from serve.rate_limit import TokenBuckets
from store.api_keys import ROLES, ApiKey, Role

_KEY_HEADER = KEY_HEADER.lower().encode()
_RETRY_AFTER_S = 2

# Each role may do what those before it may.
_RANK = {role: rank for rank, role in enumerate(ROLES)}

# Least role by method and path; `{}` stands for one segment. What is not listed here is the administrators', so a route
# that was forgotten is closed, not open.
LEAST_ROLE: dict[tuple[str, str], Role] = {
    ("POST", "/v1/predict"): "caller",
    ("POST", "/v1/predict/batch"): "caller",
    ("POST", "/v1/patients/triage"): "caller",
    ("POST", "/v1/explain"): "caller",
    ("POST", "/v1/submissions"): "caller",
    ("GET", "/v1/submissions/{}"): "caller",
    # A caller's own ones: the routes ask `check_owner`.
    ("GET", "/v1/predictions/{}"): "caller",
    ("GET", "/v1/predictions"): "reviewer",
    ("GET", "/v1/predictions/{}/image"): "reviewer",
    ("GET", "/v1/labels"): "reviewer",
    ("POST", "/v1/labels"): "reviewer",
    ("GET", "/v1/monitoring/summary"): "reviewer",
    ("GET", "/v1/alarms"): "reviewer",
    ("POST", "/v1/alarms/{}/acknowledge"): "reviewer",
    ("POST", "/v1/retrain"): "approver",
    ("GET", "/v1/retrain"): "approver",
    ("GET", "/v1/retrain/{}"): "approver",
    ("GET", "/v1/candidates"): "approver",
    ("POST", "/v1/candidates/{}/approve"): "approver",
    ("POST", "/v1/candidates/{}/reject"): "approver",
    ("POST", "/v1/champion/rollback"): "approver",
    ("DELETE", "/v1/patients/{}"): "admin",
}

# Health for probes, the model card that a caller reads before trusting an answer, and the interface's own description.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v1/model", "/docs", "/openapi.json"})
# The pages' scripts and style sheets.
OPEN_PREFIX = "/static/"
# Least role by the first part of the path of a page with sessions, which `PageGuard` lets in; "" is `/` itself. None:
# whoever comes.
PAGE_ROLES: dict[str, Role | None] = {
    "": "caller",
    "results": "caller",
    "review": "reviewer",
    "monitoring": "reviewer",
    "models": "approver",
    "about": None,
    "sign-in": None,
    "sign-out": None,
}

_LITERAL = {place: role for place, role in LEAST_ROLE.items() if "{}" not in place[1]}
_PATTERNS = [
    (method, re.compile("[^/]+".join(map(re.escape, path.split("{}")))), role)
    for (method, path), role in LEAST_ROLE.items()
    if "{}" in path
]


def page_of(path: str) -> str | None:
    """The page with sessions that a path belongs to, as in `PAGE_ROLES`; None for any other path."""
    # Starlette's routes overlook a line break at the end.
    path = path.removesuffix("\n")
    page = path[1:].partition("/")[0]
    return page if path.startswith("/") and page in PAGE_ROLES and (page or path == "/") else None


def is_open(path: str) -> bool:
    """Whether the path asks no one for a key in a header."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX) or page_of(path) is not None


def least_role(method: str, path: str) -> Role | None:
    """The least role that may send this method to this path, as the table says; None for what it does not list."""
    method = "GET" if method == "HEAD" else method
    role = _LITERAL.get((method, path))
    if role is not None:
        return role
    return next((role for given, pattern, role in _PATTERNS if given == method and pattern.fullmatch(path)), None)


@dataclass(frozen=True)
class Caller:
    """The name of an API key, or "anonymous", and what it may do."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether this caller may do what needs `role`."""
        return _RANK[self.role] >= _RANK[role]


# Where no keys are asked for: only on loopback, by whoever may log in there.
ANONYMOUS = Caller("anonymous", "admin")


def caller_of(request: Request) -> Caller:
    """Who sent this request, as the access guard around all routes found out."""
    return request.scope.get("dermray.caller", ANONYMOUS)


def check_owner(request: Request, owner: str, what: str, reviewers_only: bool = False) -> None:
    """Lets a caller see its own records only, a reviewer everyone's.

    Args:
        owner: the name that the record was stored under.
        what: field and value, for the message: "prediction_id 'x'".
        reviewers_only: the owner does not see this one either.

    Raises:
        ApiError: 404, as if the record were not there.
    """
    caller = caller_of(request)
    if (reviewers_only or caller.name != owner) and not caller.may("reviewer"):
        raise ApiError(404, "not_found", f"{what}: there is no such record")


class AccessGuard:
    """Lets a request in by its key before its body is read, and leaves the `Caller` in the scope.

    Refuses with 401 (no live key), 403 (role not enough), 429 (over the key's rate) or 503 (keys never read so far).

    Args:
        keys: the live keys; started on the first request if it was not before.
        buckets: rate limit per key in this replica; None sets none.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, buckets: TokenBuckets | None = None):
        self.app = app
        self._keys = keys
        self._buckets = buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and is_open(scope["path"])):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # No route is a WebSocket; this closes it before it is accepted.
            await send({"type": "websocket.close", "code": 1008})
            return
        if not self._keys.loaded:
            await self._keys.start()
        try:
            scope["dermray.caller"] = self._admit(scope)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> Caller:
        if not self._keys.loaded:
            raise unavailable("the store of API keys does not answer", _RETRY_AFTER_S)
        given = next((value for name, value in scope["headers"] if name == _KEY_HEADER), None)
        if given is None:
            raise ApiError(401, "unauthorized", f"{KEY_HEADER}: the header is missing; expected an API key")
        key = self._keys.find(given)
        if key is None:
            raise ApiError(401, "unauthorized", f"{KEY_HEADER}: no live API key; it is wrong or was revoked")
        if self._buckets is not None:
            self._take(self._buckets, key)
        caller = Caller(key.name, key.role)
        least = least_role(scope["method"], scope["path"]) or "admin"
        if not caller.may(least):
            raise ApiError(
                403, "forbidden", f"{KEY_HEADER}: role of the key is {key.role}; this request needs {least} or higher"
            )
        return caller

    def _take(self, buckets: TokenBuckets, key: ApiKey) -> None:
        wait_s = buckets.take(key.id)
        if wait_s > 0:
            raise ApiError(
                429, "too_many_requests", f"{KEY_HEADER}: too many requests for one key", max(1, math.ceil(wait_s))
            )


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request with a problem before its body is read."""
    headers = {}
    if not await drain(receive):
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = f'ApiKey header="{KEY_HEADER}"'
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    problem = {"error": error.error, "detail": error.detail}
    await JSONResponse(problem, error.status, headers)(scope, receive, send)
