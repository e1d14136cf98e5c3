"""Where the milliseconds of a request go."""

from __future__ import annotations

import time


class StageClock:
    """Timings of one request, from its creation on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._ends: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """Notes that a stage is over; where parts of a request overlap, the last of them counts."""
        self._ends[stage] = time.perf_counter()

    def stages(self) -> dict[str, float]:
        """Milliseconds from the end of one stage to that of the next, in the order in which they ended, and `total`."""
        stages, last = {}, self._start
        for stage, end in sorted(self._ends.items(), key=lambda item: item[1]):
            stages[stage] = round((end - last) * 1e3, 3)
            last = end
        return {**stages, "total": round((time.perf_counter() - self._start) * 1e3, 3)}
