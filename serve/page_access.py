"""Who sees which web page: sessions by cookie, sign-in for who has none, and the table of least roles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import ANONYMOUS, PAGE_ROLES, Caller, page_of, refuse
from serve.errors import ApiError
from serve.key_ring import KeyRing
from serve.rate_limit import TokenBuckets
from serve.sessions import COOKIE, Session, Sessions
from store.api_keys import Role

SIGN_IN_PATH = "/sign-in"

_SESSION = "dermray.session"
_RETRY_AFTER_S = 2


def session_of(request: Request) -> Session:
    """The session of a page's request."""
    return request.scope[_SESSION]


def set_cookie(session: Session, lifetime_s: int, headers: Headers, scheme: str) -> str:
    """The value of Set-Cookie. Whatever ends TLS in front of the service says so in X-Forwarded-Proto."""
    secure = "; Secure" if "https" in (scheme, headers.get("x-forwarded-proto", "").lower()) else ""
    # Lax: a link in an alarm's message opens a page; forms of other sites come without the cookie.
    return f"{COOKIE}={session.cookie}; Path=/; Max-Age={lifetime_s}; HttpOnly; SameSite=Lax{secure}"


class PageGuard:
    """Stands around `AccessGuard` and lets requests of pages in by their session instead of by a key in a header.

    Who has to sign in is sent to the page for it; a form whose session is over is refused with 401. The `Caller` and
    the `Session` are left in the scope.

    Args:
        keys: the live keys; None leaves the service open.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        app: ASGIApp,
        sessions: Sessions,
        keys: KeyRing | None,
        buckets: TokenBuckets | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.app = app
        self._sessions = sessions
        self._keys = keys
        self._buckets = buckets
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        page = page_of(path) if scope["type"] == "http" else None
        if page is None:
            await self.app(scope, receive, send)
            return
        if self._keys is not None and not self._keys.loaded:
            await self._keys.start()
        headers = Headers(scope=scope)
        session = self._sessions.read(_cookie(headers), self._clock())
        try:
            # A page's pictures are loaded by the page: forty of them are not forty requests of a person.
            caller = self._caller(session, PAGE_ROLES[page], PAGE_ROLES[page] is not None and not path.endswith(".jpg"))
        except ApiError as error:
            if error.status == 401 and scope["method"] in ("GET", "HEAD"):
                target = path + ("?" + scope["query_string"].decode("latin-1") if scope["query_string"] else "")
                await RedirectResponse(f"{SIGN_IN_PATH}?next={quote(target, safe='')}", 303)(scope, receive, send)
            else:
                await refuse(error, scope, receive, send)
            return
        begun = session is None
        if session is None:
            session = self._sessions.begin(None, self._clock())
        scope[_SESSION], scope["dermray.caller"] = session, caller
        cookie = set_cookie(session, self._sessions.lifetime_s, headers, scope["scheme"])

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                # An answer that begins a session itself, at sign-in, is left alone.
                if "set-cookie" not in answer:
                    answer["set-cookie"] = cookie
            await send(message)

        await self.app(scope, receive, send_with_cookie if begun else send)

    def _caller(self, session: Session | None, least: Role | None, counted: bool) -> Caller:
        if self._keys is None:
            return ANONYMOUS
        key = None if session is None or session.key_id is None else self._keys.get(session.key_id)
        if key is None:
            if least is None:
                # Of no role: such a page asks for none.
                return Caller(ANONYMOUS.name, "caller")
            if not self._keys.loaded:
                raise ApiError(503, "unavailable", "the store of API keys does not answer", _RETRY_AFTER_S)
            raise ApiError(401, "unauthorized", "session: it is over, or its API key was revoked; sign in again")
        if counted and self._buckets is not None and (wait_s := self._buckets.take(key.id)) > 0:
            detail = "session: too many requests for one API key"
            raise ApiError(429, "too_many_requests", detail, max(1, math.ceil(wait_s)))
        caller = Caller(key.name, key.role)
        if least is not None and not caller.may(least):
            detail = f"session: role of the API key is {key.role}; this page needs {least} or higher"
            raise ApiError(403, "forbidden", detail)
        return caller


def _cookie(headers: Headers) -> str | None:
    # The standard library's parser gives up on all cookies for one that it dislikes, and every other service of this
    # host, on whatever port, has its own among them.
    return cookie_parser(headers.get("cookie", "")).get(COOKIE)
