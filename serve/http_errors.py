"""Every answer that is not a success as {error, detail}: our own errors, FastAPI's and the unforeseen."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import Problem
from serve.errors import ApiError, invalid_field
from serve.request_ids import LOGGER

logger = logging.getLogger(LOGGER)

# An error's text may quote a patient's data; the log has it.
_INTERNAL = ApiError(500, "internal_error", "the service failed on this request; its log says why")
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "too_large"}


def problem_response(error: ApiError) -> JSONResponse:
    """The answer that an `ApiError` stands for."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(Problem.of(error).model_dump(), error.status, headers)


def _validation_problem(error: RequestValidationError) -> ApiError:
    parts = []
    for item in error.errors():
        field = ".".join(_name(str(part)) for part in item["loc"][1:]) or "body"
        parts.append(f"{field}: {item['msg'].removeprefix('Value error, ')}")
    return invalid_field("; ".join(parts))


def _name(text: str) -> str:
    """A field's name as the client spelt it, on one line and not at any length."""
    return (text if text.isprintable() else repr(text))[:60]


def http_problem_response(error: HTTPException) -> JSONResponse:
    """The answer that an `HTTPException` of FastAPI, Starlette or our middleware stands for."""
    code = _CODES.get(error.status_code, "http_error")
    response = problem_response(ApiError(error.status_code, code, str(error.detail)))
    # Of a 405: Allow. Of a 408: Connection.
    response.headers.update(error.headers or {})
    return response


def add_error_handlers(api: FastAPI) -> None:
    """One error shape for the whole application."""
    api.add_exception_handler(ApiError, lambda _, error: problem_response(error))
    api.add_exception_handler(RequestValidationError, lambda _, error: problem_response(_validation_problem(error)))
    api.add_exception_handler(HTTPException, lambda _, error: http_problem_response(error))
    api.add_exception_handler(Exception, lambda *_: problem_response(_INTERNAL))


class Unforeseen:
    """Answers what fails around the application, where neither its handlers nor Serve would, and has it logged."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            # The application's own handler has answered and raised it again, for Serve to log.
            if started or scope["type"] != "http":
                raise
            logger.exception("%s %s failed outside the application", scope["method"], scope["path"])
            await problem_response(_INTERNAL)(scope, receive, send)


async def check_form_fields(request: Request, known: Sequence[str], lists: Sequence[str] = ()) -> None:
    """Refuses fields that no one reads: a misspelt or second `metadata` would silently change what the model sees.

    Args:
        known: fields that the form may have, once.
        lists: those of them that it may have several times.
    """
    counts = Counter(name for name, _ in (await request.form()).multi_items())
    for name, count in counts.items():
        if name not in known:
            shown = name[:60] if name.isprintable() else repr(name[:60])
            raise invalid_field(f"{shown}: unknown form field; expected one of {', '.join(known)}")
        if count > 1 and name not in lists:
            raise invalid_field(f"{name}: given {count} times; expected it once")
