"""Multipart forms are read whole, and as UTF-8, or refused."""

from __future__ import annotations

from fastapi import HTTPException
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# RFC 2046: at most 70 characters.
_MAX_BOUNDARY = 70


class WholeForm:
    """Refuses, with 400 and {error, detail}, a multipart form that Starlette would read in part or otherwise than sent.

    Starlette takes the parts before a cut for all there is: without its `metadata`, a lesion would get another risk. It
    also decodes text by whatever codec the client names, and some of Python's take quadratic time.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # No route reads a form with another method.
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        kind, options = parse_options_header(Headers(scope=scope).get("content-type", ""))
        if kind != b"multipart/form-data":
            await self.app(scope, receive, send)
            return
        boundary, charset = options.get(b"boundary", b""), options.get(b"charset", b"utf-8")
        if not 1 <= len(boundary) <= _MAX_BOUNDARY:
            await _bad_form(f"Content-Type: expected a boundary of 1 to {_MAX_BOUNDARY} characters")(
                scope, receive, send
            )
            return
        if charset.lower() not in (b"utf-8", b"utf8", b"us-ascii"):
            await _bad_form("Content-Type: charset is not utf-8, which form fields are expected in")(
                scope, receive, send
            )
            return
        end, tail, ended = b"--" + boundary + b"--", b"", False

        async def watched() -> Message:
            nonlocal tail, ended
            message = await receive()
            if message["type"] == "http.request" and not ended:
                seen = tail + message.get("body", b"")
                ended, tail = end in seen, seen[-len(end) + 1 :]
                if not ended and not message.get("more_body", False):
                    # FastAPI turns any other exception that ends its form parser into 400 without a reason.
                    raise HTTPException(400, "form: the body ends before its closing boundary")
            return message

        await self.app(scope, watched, send)


def _bad_form(detail: str) -> JSONResponse:
    # The body is not read: the connection cannot be used again.
    return JSONResponse({"error": "bad_request", "detail": detail}, 400, {"Connection": "close"})
