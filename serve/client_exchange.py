"""What a client does, without doing it: which request to send when, how long to wait, what an answer means.

A generator yields steps, and is sent what came of each: the response of an `Attempt`, the result of a `Work`, None for
a `Wait`; what an attempt raises is thrown into it. `serve.client` and `serve.async_client` carry the steps out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
from pydantic import ValidationError

from serve.client_errors import RETRIED_STATUSES, DermrayError, UnavailableError, error_of
from serve.client_images import Image, read_image

Result = TypeVar("Result")

_FILE = "application/octet-stream"
# Nothing of the request has reached the service.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
# What another attempt may be spared. Of httpx's other errors (a header that cannot be sent, a body that does not
# unpack) the next attempt would say the same.
_BROKEN = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request and the meaning of its answer.

    Attributes:
        path: below the service's URL; ids in it are percent-encoded.
        decode: of a 2xx answer.
        content: `params`, `json`, `data` and `headers` for httpx.
        images: the form's files, each with its field's name.
        repeatable: whether the service answers a second time as it did, or would have done, the first time. A call
            that is not is sent again only where the service cannot have acted on it.
        answers: further statuses that `decode` understands.
        once: never sent again, since a refusal is what it asks for.
    """

    method: str
    path: str
    decode: Callable[[httpx.Response], Result]
    content: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[tuple[str, Image], ...] = ()
    repeatable: bool = True
    answers: frozenset[int] = frozenset()
    once: bool = False


@dataclass(frozen=True)
class Attempt:
    """Send this now, and give up with `httpx.TimeoutException` after `timeout_s`; `content` as httpx takes it."""

    method: str
    path: str
    content: Mapping[str, Any]
    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """Do nothing for so long."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call this where it may block."""

    do: Callable[[], Any]


Steps = Generator[Attempt | Wait | Work, Any, Result]


@dataclass(frozen=True)
class RetryPolicy:
    """When a request is sent again.

    Attributes:
        attempts: at most so many for one call, the first included.
        backoff_s: longest wait before the second attempt; doubled for each further one, up to `max_backoff_s`. The
            wait is random below that, so that clients that were refused together do not come back together. It is
            added to what `Retry-After` asks for.
        clock: seconds, never going back.
        random: from 0 to 1.
    """

    attempts: int = 8
    backoff_s: float = 0.25
    max_backoff_s: float = 8.0
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; expected at least 1")

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after the attempt of this number, from 1."""
        return self.random() * min(self.max_backoff_s, self.backoff_s * 2.0 ** min(attempt - 1, 60))


def exchange(call: Call[Result], policy: RetryPolicy, timeout_s: float) -> Steps[Result]:
    """Sends a call until it is answered, for `timeout_s` at most.

    Raises:
        DermrayError: the last answer's error. A wait that would pass the deadline is not begun: the error that asks
            for it is raised at once.
    """
    content = dict(call.content)
    if call.images:
        # The files' own names stay here: people name files after patients.
        files = yield Work(lambda: [(name, ("image", read_image(image), _FILE)) for name, image in call.images])
        content["files"] = files
    deadline = policy.clock() + timeout_s
    attempt, left = 1, timeout_s
    while True:
        again = call.repeatable
        try:
            response = yield Attempt(call.method, call.path, content, left)
        except httpx.RequestError as failure:
            again = isinstance(failure, _BROKEN) and (again or isinstance(failure, _NOT_SENT))
            error = _no_answer(failure)
            error.__cause__ = failure
        else:
            if response.is_success or response.status_code in call.answers:
                return _decoded(call, response)
            error = error_of(response)
            if response.status_code not in RETRIED_STATUSES:
                raise error
            # Refused for their number, requests are not looked at; cut off in the middle, they are not begun.
            again = again or response.status_code in (408, 429)
        if call.once or not again or attempt >= policy.attempts:
            raise error
        left = deadline - policy.clock()
        wait_s = error.retry_after_s or 0.0
        if wait_s >= left:
            raise error
        backoff_s = policy.backoff(attempt)
        if error.retry_after_s is None and backoff_s >= left:
            raise error
        # Of a wait that the service asked for, only the random part on top is cut to what is left.
        yield Wait(wait_s + min(backoff_s, (left - wait_s) / 2))
        left = deadline - policy.clock()
        if left <= 0:
            raise error
        attempt += 1


def _no_answer(failure: httpx.RequestError) -> UnavailableError:
    code = "timeout" if isinstance(failure, httpx.TimeoutException) else "no_answer"
    return UnavailableError(None, code, " ".join(f"{type(failure).__name__} {failure}".split()))


def _decoded(call: Call[Result], response: httpx.Response) -> Result:
    try:
        return call.decode(response)
    except (ValidationError, KeyError) as error:
        places = [item["loc"] for item in error.errors()] if isinstance(error, ValidationError) else [error.args]
        fields = ", ".join(sorted({".".join(map(str, place)) or "body" for place in places}))
        # Not the error's own text: it quotes what it found, which may be a patient's.
        raise DermrayError(
            response.status_code, "unexpected_answer", f"not what {call.method} {call.path} answers: {fields}"
        ) from None
