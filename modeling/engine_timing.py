"""How fast engines are: one alone, and as many side by side as the device has room for."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from modeling.engine_interface import Engine
from modeling.steady_line import steadily

BUCKETS = (1, 8, 32)
# A shorter measurement would be the clock's noise; a longer one makes no median better.
_MIN_SAMPLE_S = 0.05
_MIN_ROUNDS, _MAX_REPEATS = 3, 1000


@dataclass(frozen=True)
class Timing:
    """Of one batch size.

    Attributes:
        ms_per_image: of one engine that has the device to itself.
        images_per_second: of all engines that fit beside each other, running at once in threads of one process.
    """

    ms_per_image: float
    images_per_second: float


def time_engines(
    engines: Mapping[str, Sequence[Engine]],
    images: np.ndarray,
    buckets: Sequence[int] = BUCKETS,
    rounds: int = 7,
    say: Callable[[str], None] = lambda message: None,
    enough_s: float = math.inf,
) -> dict[str, dict[int, Timing]]:
    """Timings by name and batch size: medians of rounds in which the candidates alternate.

    Alternating spreads a noisy neighbour over all of them; every second round runs them in reverse.

    Args:
        engines: per candidate as many engines as keep the device busy; the first one is timed alone, too.
        enough_s: seconds after which no round is started any more, unless there were fewer than three.
    """
    alone: dict[str, dict[int, list[float]]] = {name: {bucket: [] for bucket in buckets} for name in engines}
    together: dict[str, dict[int, list[float]]] = {name: {bucket: [] for bucket in buckets} for name in engines}
    repeats: dict[int, int] = {}
    for bucket in buckets:
        batch = images[np.arange(bucket) % len(images)]
        for beside in engines.values():
            for engine in beside:
                engine.warm_up(bucket)
        # The smallest batch tells how often the others must run.
        if not repeats:
            seconds = min((_seconds(beside[:1], batch, 1) for beside in engines.values()), default=1.0) / bucket
        repeats[bucket] = min(_MAX_REPEATS, math.ceil(_MIN_SAMPLE_S / max(seconds * bucket, 1e-6)))
    progress = steadily(say, "timing: rounds", rounds)
    started = time.monotonic()
    for number in range(rounds):
        if number >= _MIN_ROUNDS and time.monotonic() - started > enough_s:
            break
        order = list(engines) if number % 2 == 0 else list(engines)[::-1]
        for bucket in buckets:
            batch = images[np.arange(bucket) % len(images)]
            for name in order:
                beside, count = engines[name], repeats[bucket] * bucket
                seconds_alone = _seconds(beside[:1], batch, repeats[bucket])
                alone[name][bucket].append(1000 * seconds_alone / count)
                seconds_together = _seconds(beside, batch, repeats[bucket]) if len(beside) > 1 else seconds_alone
                together[name][bucket].append(len(beside) * count / seconds_together)
        progress(number + 1)
    median = statistics.median
    return {
        name: {bucket: Timing(median(alone[name][bucket]), median(together[name][bucket])) for bucket in buckets}
        for name in engines
    }


def _seconds(engines: Sequence[Engine], batch: np.ndarray, repeats: int) -> float:
    """From the first start to the last end of `repeats` runs of each engine, all of them at once."""
    if len(engines) == 1:
        return _run(engines[0], batch, repeats)
    gate = threading.Barrier(len(engines))

    def work(engine: Engine) -> tuple[float, float]:
        gate.wait()
        started = time.perf_counter()
        return started, started + _run(engine, batch, repeats)

    with ThreadPoolExecutor(len(engines)) as pool:
        spans = list(pool.map(work, engines))
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _run(engine: Engine, batch: np.ndarray, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        engine.run(batch)
    return time.perf_counter() - started
