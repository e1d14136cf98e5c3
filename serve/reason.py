"""The reason that a person gives with a decision, as a field of JSON requests."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def _plain_text(text: str) -> str:
    text = text.strip()
    if not text or _CONTROL.search(text):
        raise ValueError("expected text without control characters")
    return text


Reason = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_plain_text)]
"""1 to 1000 characters, none of them a control character; blanks around are dropped."""
