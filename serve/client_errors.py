"""What a client raises: the service's {error, detail} with its status, or why there is no answer."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

logger = logging.getLogger("dermray.client")


class DermrayError(Exception):
    """An answer other than success.

    Attributes:
        status: HTTP status; None when there was no answer.
        error: short code for programs, such as "invalid_field".
        detail: one line for people.
        retry_after_s: after how many seconds the service wants to be asked again; None where it did not say.
    """

    def __init__(self, status: int | None, error: str, detail: str, retry_after_s: float | None = None):
        super().__init__(status, error, detail, retry_after_s)
        self.status = status
        self.error = error
        self.detail = detail
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.status or 'no answer'} {self.error}: {self.detail}"


class RefusedError(DermrayError):
    """4xx: the request itself is wrong, or the key may not send it; sending it again changes nothing."""


class ConflictError(RefusedError):
    """409: not in this state, or not with this model."""


class UnavailableError(DermrayError):
    """No answer in time: 408, 429, 502, 503, 504, or a broken connection (`status` None). The same request may
    succeed later."""


# 502 and 504 are what the proxy before the service says when a replica ends under a request.
RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})


def error_of(response: httpx.Response) -> DermrayError:
    """The error that an answer with a status other than 2xx stands for."""
    status, retry_after_s = response.status_code, retry_after(response)
    error, detail = "http_error", f"HTTP {status} without {{error, detail}}: not an answer of dermray"
    try:
        body = response.json()
        error, detail = str(body["error"]), str(body["detail"])
    except (ValueError, LookupError, TypeError):
        logger.debug("HTTP %d without {error, detail}, perhaps a proxy's own page", status)
    if status in RETRIED_STATUSES:
        return UnavailableError(status, error, detail, retry_after_s)
    kind = ConflictError if status == 409 else RefusedError if 400 <= status < 500 else DermrayError
    return kind(status, error, detail, retry_after_s)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of `Retry-After`, which may also be an HTTP date; None where it is absent or no such thing.

    A date counts from the answer's own `Date`, so that a client whose clock is wrong waits as long as was meant.
    """
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    wanted, now = _date(text), _date(response.headers.get("Date", ""))
    return None if wanted is None else max(0.0, (wanted - (now or datetime.now(UTC))).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
