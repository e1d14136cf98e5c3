"""What browsers are told with every answer: load nothing, keep nothing, frame nothing, guess nothing."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import page_of

# An answer of the API is data: should a browser ever show one as a page, it loads and runs nothing.
API_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# Pages of our own take scripts and styles from files of this service, pictures also from memory.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)

Headers = tuple[tuple[bytes, bytes], ...]


def _headers(policy: str) -> Headers:
    return (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        # Answers are about patients.
        (b"cache-control", b"no-store"),
        (b"content-security-policy", policy.encode()),
    )


class SecurityHeaders:
    """Adds the headers to every answer; a header that the answer has already stays.

    Args:
        policies: Content-Security-Policy by path, beside `PAGE_POLICY` of the pages; any other path has `API_POLICY`.
    """

    def __init__(self, app: ASGIApp, policies: Mapping[str, str] | None = None):
        self.app = app
        self._by_path = {path: _headers(policy) for path, policy in (policies or {}).items()}
        self._page, self._default = _headers(PAGE_POLICY), _headers(API_POLICY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        added = self._by_path.get(path) or (self._default if page_of(path) is None else self._page)

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                given = {name for name, _ in headers}
                message["headers"] = [*headers, *(header for header in added if header[0] not in given)]
            await send(message)

        await self.app(scope, receive, send_secured)
