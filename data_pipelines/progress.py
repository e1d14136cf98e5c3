"""One way to show how far a long step is: a bar on a terminal, a line every few seconds in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 5.0


class Progress:
    """Called with (done, total) as often as one likes; a context manager that ends the bar.

    Args:
        title: what is being done.
        say: prints one line; used when stderr is not a terminal.
    """

    def __init__(self, title: str, say: Callable[[str], None]):
        self._title, self._say = title, say
        self._started = self._last = time.monotonic()
        self._first: int | None = None
        self._bar: tqdm | None = None
        self._on_terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._first is None:
            # A resumed step starts in the middle: its rate counts what this run did.
            self._first = done
        if self._on_terminal:
            if self._bar is None:
                self._bar = tqdm(total=total, initial=done, desc=self._title, file=sys.stderr, unit="", unit_scale=True)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        rate = (done - self._first) / (now - self._started)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        self._say(f"{self._title}: {done:,} of {total:,} ({done / max(total, 1):.0%}), {rate:,.0f}/s{left}")
