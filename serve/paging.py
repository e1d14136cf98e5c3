"""Cursors of pages: where the next one begins, as text that a client only hands back."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TypeVar

from serve.errors import invalid_field

Id = TypeVar("Id", int, str)
_MAX_INT = 2**63 - 1
_MAX_CURSOR = 256


def encode_cursor(at: int, id_: int | str) -> str:
    """The cursor behind an item of this time (microseconds UTC) and id."""
    return base64.urlsafe_b64encode(json.dumps([at, id_], separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, id_type: type[Id]) -> tuple[int, Id] | None:
    """The inverse of `encode_cursor`; None for the first page.

    Raises:
        ApiError: 422 for anything that `encode_cursor` does not give.
    """
    if cursor is None:
        return None
    try:
        if len(cursor) > _MAX_CURSOR:
            raise ValueError("too long")
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        at, id_ = json.loads(text)
        # Also refuses true, NUL, integers beyond what the database's column holds, and another spelling of the same.
        valid = type(at) is int and type(id_) is id_type and 0 <= at <= _MAX_INT
        valid = valid and (id_.isascii() and id_.isprintable() if isinstance(id_, str) else 0 <= id_ <= _MAX_INT)
        if not valid or encode_cursor(at, id_) != cursor:
            raise ValueError("not a cursor")
    except (ValueError, TypeError, binascii.Error, RecursionError) as error:
        raise invalid_field("cursor: damaged; expected the next_cursor of the page before") from error
    return at, id_
