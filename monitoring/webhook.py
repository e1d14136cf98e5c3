"""Signs and posts one webhook, by the Standard Webhooks scheme (github.com/standard-webhooks/standard-webhooks).

`webhook-signature` is `v1,` + base64 of HMAC-SHA256 over "{webhook-id}.{webhook-timestamp}.{body}". Receivers check it,
refuse old timestamps, and take a `webhook-id` once: docs/alarms.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import email.utils
import hashlib
import hmac
import math
import time
from dataclasses import dataclass

SECRET_PREFIX = "whsec_"
_MIN_SECRET_BYTES = 16
USER_AGENT = "dermray"


@dataclass(frozen=True)
class Answer:
    """What became of one attempt. `error` None: taken (2xx). `retry_after_s`: what the receiver asked for."""

    error: str | None
    retry_after_s: float | None = None


def parse_secrets(text: str) -> list[bytes]:
    """The keys of a signing secret: `whsec_` + base64; several, parted by spaces, while one replaces another.

    Raises:
        ValueError: not of this form, or shorter than 16 bytes; without the text.
    """
    keys = []
    for part in text.split():
        try:
            key = base64.b64decode(part.removeprefix(SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not part.startswith(SECRET_PREFIX) or len(key) < _MIN_SECRET_BYTES:
            raise ValueError(f"a signing secret is {SECRET_PREFIX} + base64 of at least {_MIN_SECRET_BYTES} bytes")
        keys.append(key)
    if not keys:
        raise ValueError("the signing secret is empty")
    return keys


def signed_headers(message_id: str, timestamp: int, body: bytes, keys: list[bytes]) -> dict[str, str]:
    """The three headers of a message.

    Args:
        timestamp: of this attempt, seconds since the epoch.
    """
    content = f"{message_id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode() for key in keys]
    headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
    return headers | ({"webhook-signature": " ".join(f"v1,{one}" for one in signatures)} if keys else {})


async def post(url: str, message_id: str, body: bytes, keys: list[bytes], timeout_s: float) -> Answer:
    """One attempt; every failure is an answer. It ends after `timeout_s`, whatever the receiver does.

    Only the status line and headers of the answer are read, and no redirect is followed: the body must not go to a
    place that nobody configured.
    """
    import httpx

    headers = signed_headers(message_id, int(time.time()), body, keys)
    headers |= {"content-type": "application/json", "user-agent": USER_AGENT}
    try:
        # httpx's own timeouts are per read: a receiver that sends a byte now and then would never meet them.
        async with asyncio.timeout(timeout_s), httpx.AsyncClient(timeout=None, follow_redirects=False) as client:
            request = client.build_request("POST", url, content=body, headers=headers)
            response = await client.send(request, stream=True)
            try:
                return _judge(response.status_code, response.headers.get("retry-after"))
            finally:
                await response.aclose()
    except TimeoutError:
        return Answer(f"no answer within {timeout_s:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        # The type and what the system says; no URL, whose path may be a secret.
        return Answer(f"{type(error).__name__}: {str(error).replace(url, 'URL')[:200]}".rstrip(": "))


def _judge(status: int, retry_after: str | None) -> Answer:
    if 200 <= status < 300:
        return Answer(None)
    note = ", a redirect, which is not followed" if 300 <= status < 400 else ""
    return Answer(f"answered {status}{note}", _seconds(retry_after))


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After is a number of seconds or a date; what is neither counts for nothing."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
