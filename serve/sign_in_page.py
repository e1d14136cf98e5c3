"""Sign in with an API key, and out again."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from serve.access import page_of
from serve.backend import Backend
from serve.page_access import SIGN_IN_PATH, set_cookie
from serve.page_forms import read_form, text_field
from serve.page_templates import render
from serve.sessions import Session


def safe_target(target: str) -> str:
    """Where to go after signing in: a page of this service, else the first one. A link may have asked for anything."""
    own = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if own and page_of(target.partition("?")[0]) is not None else "/"


def add_sign_in_routes(api: FastAPI, backend: Backend) -> None:
    """`GET` and `POST /sign-in`, `POST /sign-out`."""

    def page(request: Request, target: str, problem: str = "", status: int = 200) -> Response:
        synthetic = backend.service.model.task.synthetic
        return render(request, synthetic, "sign_in.html", status, target=target, problem=problem)

    def begin(request: Request, target: str, key_id: str | None) -> Response:
        session: Session = backend.sessions.begin(key_id, time.time())
        answer = RedirectResponse(target, 303)
        answer.headers["set-cookie"] = set_cookie(
            session, backend.sessions.lifetime_s, request.headers, request.url.scheme
        )
        return answer

    async def show(request: Request) -> Response:
        target = safe_target(request.query_params.get("next", "/"))
        return RedirectResponse(target, 303) if backend.keys is None else page(request, target)

    async def sign_in(request: Request) -> Response:
        form = await read_form(request)
        target = safe_target(text_field(form, "next"))
        if backend.keys is None:
            return RedirectResponse(target, 303)
        key = backend.keys.find(text_field(form, "key").encode())
        if key is None:
            return page(request, target, "API key: no live key; it is mistyped or was revoked", 401)
        return begin(request, target, key.id)

    async def sign_out(request: Request) -> Response:
        await read_form(request)
        return begin(request, SIGN_IN_PATH if backend.keys is not None else "/", None)

    api.add_route(SIGN_IN_PATH, show, ["GET"], include_in_schema=False)
    api.add_route(SIGN_IN_PATH, sign_in, ["POST"], include_in_schema=False)
    api.add_route("/sign-out", sign_out, ["POST"], include_in_schema=False)
