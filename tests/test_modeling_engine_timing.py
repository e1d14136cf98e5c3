"""Timings that compare engines rather than the minute each was measured in, or the room it had to itself."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from modeling.engine_timing import time_engines

IMAGES = np.zeros((4, 2, 2, 3), np.uint8)


class Timed:
    """Moves a clock on by its next cost."""

    def __init__(self, name, costs, clock, order):
        self.name, self.costs, self.clock, self.order = name, iter(costs), clock, order

    def warm_up(self, batch):
        pass

    def run(self, images, with_cam=False):
        self.order.append(self.name)
        self.clock[0] += next(self.costs)


def test_rounds_alternate_and_the_median_ignores_an_outlier(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("modeling.engine_timing.time.perf_counter", lambda: clock[0])
    costs = {"a": [0.08, 0.08, 8.0, 0.08], "b": [0.16, 0.16, 0.16, 0.16]}
    engines = {name: [Timed(name, values, clock, order)] for name, values in costs.items()}
    timings = time_engines(engines, IMAGES, buckets=(8,), rounds=3)
    assert {name: value[8].ms_per_image for name, value in timings.items()} == pytest.approx({"a": 10, "b": 20})
    # Alone on the device, what one engine does is all that is done.
    assert {name: value[8].images_per_second for name, value in timings.items()} == pytest.approx({"a": 100, "b": 50})
    # Each runs once before, to see how long it takes.
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]


class Meeting:
    """Waits for the other one whenever it does not run in the main thread."""

    def __init__(self, meeting):
        self.meeting = meeting

    def warm_up(self, batch):
        pass

    def run(self, images, with_cam=False):
        if threading.current_thread() is not threading.main_thread():
            self.meeting.wait(timeout=60)
            self.met = True


def test_engines_that_share_a_device_are_timed_at_once():
    """Two that never ran at the same moment would wait in vain."""
    meeting = threading.Barrier(2)
    pair = [Meeting(meeting), Meeting(meeting)]
    timing = time_engines({"pair": pair}, IMAGES, buckets=(1,), rounds=1)["pair"][1]
    assert timing.images_per_second > 0 and timing.ms_per_image > 0 and all(engine.met for engine in pair)


@pytest.mark.parametrize(("enough_s", "expected"), [(0.0, 3), (5.0, 6), (1e9, 7)])
def test_no_round_starts_when_enough_time_was_spent_beyond_three(monkeypatch, enough_s, expected):
    """Rounds of a second: after five of them a sixth starts, since five are not more than five."""
    clock, order = [0.0], []
    monkeypatch.setattr("modeling.engine_timing.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("modeling.engine_timing.time.monotonic", lambda: clock[0])
    engines = {"a": [Timed("a", [1.0] * 20, clock, order)]}
    time_engines(engines, IMAGES, buckets=(8,), rounds=7, enough_s=enough_s)
    assert len(order) == 1 + expected


def test_the_rate_of_a_device_is_that_of_all_engines_on_it(monkeypatch):
    """Of two engines that start together and need 4 and 6 seconds for a batch, the device has done two in six."""
    seconds = {"first": 4.0, "second": 6.0}
    clock, order = [0.0], []
    engines = [Timed(name, [0.0], clock, order) for name in seconds]
    monkeypatch.setattr("modeling.engine_timing.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        "modeling.engine_timing._run", lambda engine, batch, repeats: repeats * len(batch) * seconds[engine.name]
    )
    timing = time_engines({"pair": engines}, IMAGES, buckets=(2,), rounds=1)["pair"][2]
    assert timing.ms_per_image == 4000 and timing.images_per_second == pytest.approx(2 / 6)
