"""How many requests a key may send: one token bucket per key, in this process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_BUCKETS = 4096


class TokenBuckets:
    """`burst` requests at once, `per_s` a second in the long run, for each key by itself. Not thread-safe.

    Args:
        max_buckets: of more keys, those unused the longest are forgotten and start with a full bucket again.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        per_s: float,
        burst: int,
        max_buckets: int = MAX_BUCKETS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._per_s = per_s
        self._burst = float(burst)
        self._max_buckets = max_buckets
        self._clock = clock
        # Tokens left and the time of that count, by key, in the order of last use.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str) -> float:
        """Takes a token: 0 when there was one, else the seconds until there is."""
        now = self._clock()
        tokens, since = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > self._max_buckets:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._per_s
