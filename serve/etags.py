"""Whether a browser has already what it asks for."""

from __future__ import annotations


def matches(if_none_match: str | None, tag: str) -> bool:
    """Whether the header If-None-Match names this tag, given without its quotes (RFC 9110, weak comparison)."""
    known = [given.strip().removeprefix("W/") for given in (if_none_match or "").split(",")]
    return "*" in known or f'"{tag}"' in known
