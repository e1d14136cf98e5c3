"""Where the milliseconds of a request go."""

from __future__ import annotations

import time


class StageClock:
    """Timings of one request, from its creation on.

    `received_at`: when it began, microseconds since the epoch, UTC.
    """

    def __init__(self) -> None:
        self.received_at = time.time_ns() // 1000
        self._start = self._lap = time.perf_counter()
        self._stages: dict[str, float] = {}

    def restart_lap(self) -> None:
        """Leaves the time since the last lap out of every stage."""
        self._lap = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage: the time since the last lap is its own."""
        now = time.perf_counter()
        self._stages[stage] = round((now - self._lap) * 1e3, 3)
        self._lap = now

    def stages(self) -> dict[str, float]:
        """Milliseconds by stage so far, and their `total`, which includes the gaps."""
        return {**self._stages, "total": round((time.perf_counter() - self._start) * 1e3, 3)}
