"""Progress that can be read: at most one line every few seconds, whatever reports it."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS = 5.0


def steadily(say: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    """A callback for loops: told how many of `total` are done, it says "`what`: 3 of 9" at most every five seconds."""
    last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            say(f"{what}: {done} of {total}")

    return progress
