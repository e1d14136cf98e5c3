"""What goes wrong with a page's request is told as a page, whoever found it: route, guard or parser."""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import page_of
from serve.page_templates import NAVIGATION, environment
from serve.prediction_service import PredictionService

# What people can do about it.
_ADVICE = {
    401: "Sign in again, then send the form once more.",
    403: "Load the page again. If your role is not enough, ask an administrator.",
    404: "Check the address, or start again.",
    408: "The upload was too slow. Try smaller pictures, or a better connection.",
    409: "Start again from the first page.",
    413: "Send fewer or smaller pictures, or a smaller file.",
    415: "Send a JPEG, PNG or WebP picture.",
    422: "Correct the field, then send the form again.",
    429: "Wait a moment, then try again.",
    503: "The service is busy or starting. Wait a moment, then try again.",
}


class PageProblems:
    """Turns {error, detail} with an error status into HTML where the path is a page's."""

    def __init__(self, app: ASGIApp, service: PredictionService):
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or page_of(scope["path"]) is None:
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def translated(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                is_json = Headers(raw=message["headers"]).get("content-type", "").startswith("application/json")
                if message["status"] >= 400 and is_json:
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                body += message.get("body", b"")
                if message.get("more_body", False):
                    return
                await self._answer(start, body, scope, send)
                return
            await send(message)

        await self.app(scope, receive, translated)

    async def _answer(self, start: Message, body: bytes, scope: Scope, send: Send) -> None:
        problem = json.loads(body)
        status = start["status"]
        page = environment().get_template("problem.html")
        html = page.render(
            path=scope["path"],
            navigation=NAVIGATION,
            # Whoever found the problem may have come before the session was looked at.
            signed_in=None,
            title=HTTPStatus(status).phrase,
            status=status,
            detail=problem.get("detail", ""),
            advice=_ADVICE.get(status, "Try again; if it happens again, the service's log says why."),
            synthetic=self._service.model.task.synthetic,
        ).encode()
        replaced = {b"content-type": b"text/html; charset=utf-8", b"content-length": str(len(html)).encode()}
        headers = [(name, value) for name, value in start["headers"] if name.lower() not in replaced]
        await send({**start, "headers": [*headers, *replaced.items()]})
        await send({"type": "http.response.body", "body": html})
