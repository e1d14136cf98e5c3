"""The id of a request: from its header or new, in every answer, and in the log lines of every node that works for it.

Serve gives a request an id too: it takes any header for one, and shows it in the ingress's lines. `RequestIds` stands
around Serve's own handling in each replica's HTTP server (serve/front_door.py), so that Serve sees, logs and answers
the id that we accepted. Calls between the nodes are shared by several requests and are made outside their contexts,
where Serve would invent an id: there the ids travel as arguments.
"""

from __future__ import annotations

import contextvars
import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-ID"
# Serve's logger writes the replica's log file.
LOGGER = "ray.serve"
# An inner node's call that takes longer is worth a line: a full batch takes a tenth of it on one core.
SLOW_CALL_S = 1.0
# As many requests as admission lets in by default; a line of the log stays below 5 kB.
MAX_IDS = 64
_MORE = "..."
# UUIDs, ULIDs, trace ids. No blank, comma or bracket, which stand between ids in a line, and no percent sign.
_VALID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,64}")
_RAW_HEADER = HEADER.lower().encode()
_SCOPE_KEY = "dermray.request_id"

logger = logging.getLogger(LOGGER)


class _Work(NamedTuple):
    ids: tuple[str, ...] = ()
    # For several requests, or in another node than theirs; not within the one request that Serve knows.
    shared: bool = False


_NO_WORK = _Work()
_work: contextvars.ContextVar[_Work] = contextvars.ContextVar("work", default=_NO_WORK)


def current_ids() -> tuple[str, ...]:
    """The requests that the running task works for; none outside of any."""
    return _work.get().ids


def join_ids(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The ids of several groups, each once, in order; above `MAX_IDS` the last entry says that there are more."""
    joined = dict.fromkeys(request_id for ids in groups for request_id in ids)
    known = tuple(request_id for request_id in joined if request_id != _MORE)
    complete = _MORE not in joined and len(known) <= MAX_IDS
    return known if complete else (*known[:MAX_IDS], _MORE)


@contextmanager
def working_for(ids: tuple[str, ...], shared: bool = True) -> Iterator[None]:
    """Within it, lines of the log show these ids.

    Args:
        shared: False within the request itself, whose id Serve shows.
    """
    token = _work.set(_Work(ids, shared))
    try:
        yield
    finally:
        _work.reset(token)


@contextmanager
def watched_call(what: str, num_items: int, ids: tuple[str, ...]) -> Iterator[None]:
    """A call of an inner node for the requests `ids`: a line in the log if it fails or takes over `SLOW_CALL_S`.

    Args:
        what: the call, such as "score".
        num_items: its pictures, lesions or entries.
    """
    with working_for(ids):
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            logger.error("%s of %d failed after %.0f ms: %r", what, num_items, _ms_since(start), error)
            raise
        if time.perf_counter() - start > SLOW_CALL_S:
            logger.warning("slow: %s of %d took %.0f ms", what, num_items, _ms_since(start))


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


class RequestIdFilter(logging.Filter):
    """Adds the ids to lines of the log.

    A request's own goes where Serve's format has a place for it. Those of shared work go in front of the message: Serve
    may put an id that it invented for the call into that place.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        ids, shared = _work.get()
        if shared and ids:
            record.msg = f"[requests {','.join(ids)}] {record.msg}"
        elif ids and not hasattr(record, "request_id"):
            record.request_id = ids[0]
        return True


_FILTER = RequestIdFilter()


def show_ids_in_log() -> None:
    """Adds the filter to this process's Serve logger, once."""
    logger.addFilter(_FILTER)


class RequestIds:
    """Gives every request one valid `X-Request-ID`, and its answer the same.

    A header that is missing, given twice or not of 1 to 64 letters, digits and `._:/+=@-` is replaced by a new id.

    Args:
        answers: whether to add the header to the answer; not where another instance around this one does.
    """

    def __init__(self, app: ASGIApp, answers: bool = True):
        self.app = app
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # Set already where another instance stands around this one.
        request_id = scope.get(_SCOPE_KEY)
        answers = self.answers and request_id is None
        if request_id is None:
            request_id = scope[_SCOPE_KEY] = _accept(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                # Serve adds one of its own.
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with working_for((request_id,), shared=False):
            await self.app(scope, receive, send_with_id if answers else send)


def _accept(scope: Scope) -> str:
    """The request's id; the scope's headers have it, once, afterwards."""
    given = [value for name, value in scope["headers"] if name == _RAW_HEADER]
    if len(given) == 1 and _VALID.fullmatch(given[0]):
        return given[0].decode()
    request_id = uuid.uuid4().hex
    others = [(name, value) for name, value in scope["headers"] if name != _RAW_HEADER]
    scope["headers"] = [*others, (_RAW_HEADER, request_id.encode())]
    return request_id
