"""Sessions of the web pages: a signed cookie that names the API key someone signed in with, and the token against forms
of other sites.

Nothing is stored: any replica verifies a cookie with a key derived (HMAC-SHA512) from the service's patient secret. A
session ends with its time, with its API key, or with the cookie.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from dataclasses import dataclass

COOKIE = "dermray_session"
CSRF_FIELD = "csrf_token"
SESSION_S = 12 * 3600
# Of someone who has not signed in: only forms are tied to it.
_NOBODY = "-"
_MAX_COOKIE = 400


@dataclass(frozen=True)
class Session:
    """A cookie that is genuine and not over.

    Attributes:
        cookie: its whole text.
        key_id: of the API key; None for someone who has not signed in.
        expires_at: seconds since the epoch.
        csrf_token: what forms of this session carry.
    """

    cookie: str
    key_id: str | None
    expires_at: int
    csrf_token: str


class Sessions:
    """Makes and verifies session cookies.

    Args:
        secret: of the service, the same in every replica.
        lifetime_s: after so many seconds a session is over.
    """

    def __init__(self, secret: bytes, lifetime_s: int = SESSION_S):
        if not secret:
            raise ValueError("the secret behind sessions is empty; expected the service's patient key")
        # Not HMAC-SHA256 of a text: that is a patient's pseudonym, which callers see, and they choose patient ids.
        root = hmac.digest(secret, b"\0dermray page sessions", "sha512")
        self._signing, self._forms = root[:32], root[32:]
        self.lifetime_s = lifetime_s

    def begin(self, key_id: str | None, now_s: float) -> Session:
        """A new session, under a cookie that nobody had."""
        expires_at = int(now_s) + self.lifetime_s
        text = f"{key_id or _NOBODY}.{expires_at}.{secrets.token_urlsafe(16)}"
        return self._session(f"{text}.{self._sign(text)}", key_id, expires_at)

    def read(self, cookie: str | None, now_s: float) -> Session | None:
        """The session of a cookie; None for one that is over, was changed, or is not ours."""
        if cookie is None or len(cookie) > _MAX_COOKIE or not cookie.isascii():
            return None
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature, self._sign(text)):
            return None
        key_id, expires_at, _ = text.split(".")
        if now_s >= int(expires_at):
            return None
        return self._session(cookie, None if key_id == _NOBODY else key_id, int(expires_at))

    def _session(self, cookie: str, key_id: str | None, expires_at: int) -> Session:
        return Session(cookie, key_id, expires_at, _text(hmac.digest(self._forms, cookie.encode(), "sha256")))

    def _sign(self, text: str) -> str:
        return _text(hmac.digest(self._signing, text.encode(), "sha256"))


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
