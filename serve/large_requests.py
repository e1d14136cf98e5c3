"""Requests of many pictures are worked off in the order in which they came, and only if they can be answered in time.

Scored all at once, each of K would get a K-th of the network, until all are past their deadline and what was scored of
them is thrown away.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve.errors import unavailable
from serve.settings import LargeRequestSettings

# The rate is a mean over the last seconds of work, that is without the time between large requests.
_MEMORY_S = 10.0
# Until so much work was seen, nothing is estimated; after so long without any, scorers may have come or gone.
_ENOUGH_S = 2.0
_FORGET_S = 60.0


class ScoringRate:
    """Pictures per second that large requests get from the network, small ones beside them.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._pictures = self._seconds = 0.0
        self._at = -math.inf
        self._measuring = False

    def begin(self) -> None:
        """A large request is scored."""
        if self._measuring:
            return
        if self._clock() - self._at > _FORGET_S:
            self._pictures = self._seconds = 0.0
        self._at, self._measuring = self._clock(), True

    def end(self) -> None:
        """No large request is scored any more."""
        self._pass_time()
        self._measuring = False

    def add(self, num_pictures: int) -> None:
        """So many have been scored."""
        self._pass_time()
        self._pictures += num_pictures

    def per_s(self) -> float | None:
        """None while it is not known."""
        self._pass_time()
        return self._pictures / self._seconds if self._seconds >= _ENOUGH_S else None

    def _pass_time(self) -> None:
        if not self._measuring:
            return
        passed, self._at = self._clock() - self._at, self._clock()
        # Before the first picture, a scorer may still have to start: that says nothing about its rate.
        if self._pictures > 0:
            kept = math.exp(-passed / _MEMORY_S)
            self._pictures *= kept
            self._seconds = self._seconds * kept + passed


class Turn:
    """A large request that waits or is scored.

    Attributes:
        left: its pictures that have not been scored.
    """

    def __init__(self, num_pictures: int, rate: ScoringRate | None):
        self.left = num_pictures
        self.called: asyncio.Future[None] | None = None
        self._rate = rate

    def scored(self, num_pictures: int) -> None:
        """To be told after each part."""
        self.left = max(0, self.left - num_pictures)
        if self._rate is not None:
            self._rate.add(num_pictures)


class LargeRequests:
    """Gives large requests of one ingress replica their turns.

    Args:
        larger_than: most pictures of a request that is never held.
        retry_after_s: what a refusal tells the client at least.
        clock: seconds; the deadlines are its own.
    """

    def __init__(
        self,
        settings: LargeRequestSettings,
        larger_than: int,
        retry_after_s: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._settings = settings
        self._larger_than = larger_than
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._rate = ScoringRate(clock)
        self._line: deque[Turn] = deque()
        self._running: list[Turn] = []

    @asynccontextmanager
    async def turn(self, num_pictures: int, deadline: float) -> AsyncIterator[Turn]:
        """Waits for the turn of a request, and holds it inside the block.

        Raises:
            ApiError: 503, too many wait, or at the rate of the last seconds it would not end before its deadline. One
                that finds nobody before it is always tried, so that a wrong estimate cannot stay.
        """
        if num_pictures <= self._larger_than:
            yield Turn(num_pictures, None)
            return
        turn = Turn(num_pictures, self._rate)
        if not self._line and len(self._running) < self._settings.at_a_time:
            if self._running:
                self._check_time(turn, self._beside(turn), deadline)
            self._start(turn)
        else:
            await self._wait(turn, deadline)
        try:
            # What has waited may have become too late.
            if turn.called is not None:
                self._check_time(turn, self._beside(turn), deadline)
            yield turn
        finally:
            self._end(turn)

    async def _wait(self, turn: Turn, deadline: float) -> None:
        if len(self._line) >= self._settings.max_waiting:
            raise unavailable(f"{len(self._line)} large requests wait already (large_requests)", self._retry_after_s)
        self._check_time(turn, sum(other.left for other in [*self._running, *self._line]), deadline)
        turn.called = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn.called
        except BaseException:
            if turn in self._running:
                # Called in the moment in which it broke off.
                self._end(turn)
            else:
                self._line.remove(turn)
            raise

    def _call_next(self) -> None:
        while self._line and len(self._running) < self._settings.at_a_time:
            turn = self._line.popleft()
            self._start(turn)
            assert turn.called is not None, "who is in the line waits"
            turn.called.set_result(None)

    def _start(self, turn: Turn) -> None:
        self._rate.begin()
        self._running.append(turn)

    def _end(self, turn: Turn) -> None:
        self._running.remove(turn)
        self._call_next()
        if not self._running:
            self._rate.end()

    def _beside(self, turn: Turn) -> int:
        """Pictures that are scored before the last one of this turn: those beside it get as much of the network."""
        return sum(min(other.left, turn.left) for other in self._running if other is not turn)

    def _check_time(self, turn: Turn, before: int, deadline: float) -> None:
        rate, left_s = self._rate.per_s(), deadline - self._clock()
        if rate is None or before + turn.left <= rate * left_s:
            return
        detail = (
            f"{turn.left} pictures, and {before} before them, at {rate:.3g} a second; expected an answer within "
            f"{left_s:.3g} s"
        )
        # Until then, what is too much now is done; but nobody knows what the rate is in a minute.
        late_s = (before + turn.left) / rate - left_s if rate > 0 else 0.0
        raise unavailable(detail, max(self._retry_after_s, math.ceil(min(late_s, _FORGET_S))))
