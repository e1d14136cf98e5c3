"""Where a client sends its requests, and as whom."""

from __future__ import annotations

import os
from typing import Any

import httpx

from serve.api import KEY_HEADER

KEY_VARIABLE = "DERMRAY_API_KEY"


def http_options(base_url: str, api_key: str | None, trust_env: bool) -> dict[str, Any]:
    """Arguments of httpx's client.

    Args:
        api_key: None takes the one of the environment variable DERMRAY_API_KEY; without that, none is sent.
        trust_env: whether proxies of the environment (`https_proxy` and so on) are used.

    Raises:
        ValueError: no http or https URL, or a key that cannot be one; the message does not quote the key.
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url: {base_url!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url: {base_url!r}; expected a URL such as http://127.0.0.1:8000")
    key = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"api_key: expected printable ASCII characters, from the argument or {KEY_VARIABLE}")
    # No redirects are followed: the key is for this service alone.
    return {"base_url": url, "headers": {KEY_HEADER: key} if key else {}, "trust_env": trust_env}
