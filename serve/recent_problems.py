"""What one replica has refused or failed to answer in the last days, kept in memory by the hour."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

_HOUR_S = 3600
# The longest window that a page shows.
_KEPT_HOURS = 7 * 24


class RecentProblems:
    """Counts answers with an error status by (status, error code); of one event loop.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._by_hour: dict[int, Counter[tuple[int, str]]] = {}
        self.began_s = clock()
        """Since when it counts, seconds since the epoch."""

    def add(self, status: int, error: str) -> None:
        """One answer more."""
        hour = int(self._clock() // _HOUR_S)
        if hour not in self._by_hour:
            self._by_hour = {kept: found for kept, found in self._by_hour.items() if kept > hour - _KEPT_HOURS}
            self._by_hour[hour] = Counter()
        self._by_hour[hour][status, error] += 1

    def counts(self, hours: int) -> Counter[tuple[int, str]]:
        """Those of the last `hours` begun hours of the clock, the present one counted."""
        first = int(self._clock() // _HOUR_S) - hours + 1
        return sum((found for hour, found in self._by_hour.items() if hour >= first), Counter())
