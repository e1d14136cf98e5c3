"""Requests of many pictures end one after the other, and what would not end in time is not begun."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from serve import large_requests
from serve.errors import ApiError
from serve.image_scorer import ImageScores
from serve.large_requests import LargeRequests, ScoringRate
from serve.lesion import LesionRequest
from serve.lesion_scoring import LesionScoring
from serve.metadata_fusion import FusedRisks
from serve.settings import IngressSettings, LargeRequestSettings, UploadLimits
from serve.stage_clock import StageClock
from tests.bundle_factory import lesion_image

LIMIT_S = 30.0


class Network:
    """A network that scores so many pictures a second, told by its own clock, and the requests that share it."""

    def __init__(self, rate: float = 100.0, **settings):
        self.now = 1000.0
        self.rate = rate
        self.scored = 0
        self.events = []
        self.large = LargeRequests(
            LargeRequestSettings(**settings), larger_than=16, retry_after_s=2, clock=lambda: self.now
        )
        self._jobs = {}
        self._served = {}

    async def ask(self, name, pictures: int, limit_s: float = LIMIT_S):
        """Seconds that a request took; ApiError when it is refused."""
        began = self.now
        async with self.large.turn(pictures, began + limit_s) as turn:
            self.events.append(name)
            done = asyncio.get_running_loop().create_future()
            self._jobs[name] = [pictures, turn, done]
            try:
                await done
            finally:
                self._jobs.pop(name, None)
        return self.now - began

    def start(self, name, pictures: int, limit_s: float = LIMIT_S) -> asyncio.Task:
        return asyncio.create_task(self.ask(name, pictures, limit_s))

    async def run(self, *tasks):
        """Turns the clock, pictures shared evenly among those under way, until the tasks are done; their results."""
        for _ in range(100_000):
            for _ in range(5):
                await asyncio.sleep(0)
            if all(task.done() for task in tasks):
                return [task.exception() or task.result() for task in tasks]
            self.step()
        raise AssertionError("the requests do not end")

    def step(self, seconds: float = 0.1):
        self.now += seconds
        jobs = list(self._jobs.values())
        for job in jobs:
            pictures = min(self.rate * seconds / len(jobs), job[0])
            job[0] -= pictures
            self.scored += pictures
            job[1].scored(pictures)
            if job[0] < 1e-6 and not job[2].done():
                job[2].set_result(None)

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)


def refused(error) -> ApiError:
    assert isinstance(error, ApiError), error
    assert (error.status, error.error) == (503, "unavailable")
    return error


def test_large_requests_end_in_the_order_in_which_they_came():
    async def scenario():
        network = Network(at_a_time=2)
        tasks = [network.start(name, 200) for name in range(5)]
        took = await network.run(*tasks)
        assert network.events == [0, 1, 2, 3, 4]
        # All at once, each would have taken ten seconds.
        assert took == pytest.approx([4.0, 4.0, 8.0, 8.0, 10.0], abs=0.5)

    asyncio.run(scenario())


def test_a_small_request_is_never_held_and_a_large_one_holds_only_large_ones():
    async def scenario():
        network = Network(at_a_time=1, max_waiting=0)
        large = network.start("large", 256)
        await network.settle()
        small = [network.start(index, 16) for index in range(20)]
        await network.settle()
        assert network.events == ["large", *range(20)]
        refused((await network.run(network.start("late", 17)))[0])
        await network.run(large, *small)

    asyncio.run(scenario())


def test_more_requests_than_can_be_answered_waste_nothing():
    """Each of twenty would need 51 s if all were scored side by side."""

    async def scenario():
        network = Network(at_a_time=2, max_waiting=1000)
        await network.run(network.start("before", 256))
        network.scored = 0
        results = await network.run(*[network.start(name, 256) for name in range(20)])
        times = [result for result in results if not isinstance(result, ApiError)]
        errors = [refused(result) for result in results if isinstance(result, ApiError)]
        assert 10 <= len(times) <= 12 and max(times) <= LIMIT_S
        assert network.scored == pytest.approx(256 * len(times))
        assert network.events[1:] == list(range(len(times)))
        assert "256 pictures" in errors[0].detail and "expected an answer within 30 s" in errors[0].detail
        # The last would come 21 s too late.
        assert 2 <= errors[0].retry_after_s < errors[-1].retry_after_s + 1 <= 23

    asyncio.run(scenario())


def test_what_became_too_late_while_it_waited_is_not_begun():
    async def scenario():
        network = Network(at_a_time=1)
        first, second = network.start("first", 400), network.start("second", 1000)
        await network.settle()
        for _ in range(30):
            network.step()
        network.rate = 10.0
        results = await network.run(first, second)
        assert results[0] < LIMIT_S
        refused(results[1])
        assert network.events == ["first"]

    asyncio.run(scenario())


def test_one_that_finds_nobody_is_tried_whatever_the_rate_was():
    async def scenario():
        network = Network(rate=5)
        await network.run(network.start("slow", 256, limit_s=60))
        network.rate = 1000
        assert await network.run(network.start("quick", 256)) == pytest.approx([0.3], abs=0.2)

    asyncio.run(scenario())


def test_the_rate_stays_while_nobody_is_scored_until_it_is_forgotten():
    now = 0.0
    rate = ScoringRate(lambda: now)
    rate.begin()
    for _ in range(30):
        now += 0.1
        rate.add(10)
    rate.end()
    known = rate.per_s()
    assert known == pytest.approx(100, rel=0.1)
    now += 30
    assert rate.per_s() == known
    rate.begin()
    assert rate.per_s() == known
    rate.end()
    now += 61
    rate.begin()
    assert rate.per_s() is None


def test_time_without_large_requests_says_nothing_about_the_rate():
    async def scenario():
        network = Network()
        await network.run(network.start("before", 256))
        network.now += 50
        results = await network.run(*[network.start(name, 256) for name in range(4)])
        assert all(isinstance(result, float) for result in results), results

    asyncio.run(scenario())


def test_a_scorer_that_has_to_start_first_is_not_taken_for_a_slow_one():
    async def scenario():
        network = Network()
        network.rate = 0
        first = network.start("first", 256)
        await network.settle()
        for _ in range(150):
            network.step()
        network.rate = 100
        network.step()
        others = [network.start(name, 256) for name in range(3)]
        results = await network.run(first, *others)
        assert all(isinstance(result, float) for result in results), results

    asyncio.run(scenario())


def test_requests_that_break_off_leave_their_turn_to_the_next():
    async def scenario():
        network = Network(at_a_time=1)
        first, second, third, fourth = (network.start(name, 100) for name in range(4))
        await network.settle()
        second.cancel()
        await network.settle()
        first.cancel()
        await asyncio.sleep(0)
        # The third was called in this moment, and breaks off before it runs.
        third.cancel()
        await network.settle()
        assert await network.run(fourth) == pytest.approx([1.0], abs=0.2)
        assert [task.cancelled() for task in (first, second, third)] == [True] * 3
        assert network.events == [0, 3]

    asyncio.run(scenario())


class Nodes:
    """The scorer and the fusion node of `LesionScoring`, and which requests had pictures at the network together."""

    def __init__(self, seconds: float = 0.001):
        self.seconds = seconds
        self.now = {}
        self.most = 0
        self.order = []
        self.calls = 0

    async def score(self, images, deadline):
        self.calls += 1
        if deadline not in self.order:
            self.order.append(deadline)
        self.now[deadline] = self.now.get(deadline, 0) + 1
        self.most = max(self.most, sum(count > 0 for count in self.now.values()))
        await asyncio.sleep(self.seconds)
        self.now[deadline] -= 1
        ones = np.zeros((len(images), 2), np.float32)
        return ImageScores("digest", ones, ones)

    async def fuse(self, log_probabilities, records):
        return FusedRisks("digest", list(range(len(records))))


def test_the_pictures_of_two_large_requests_and_no_more_are_at_the_network():
    async def scenario():
        nodes = Nodes()
        scoring = LesionScoring(nodes, nodes, UploadLimits(), IngressSettings(), max_batch_size=4)
        model = SimpleNamespace(digest="digest", input_size=32, abstention=None)
        lesions = {index: LesionRequest(lesion_image()) for index in range(9)}
        began = time.monotonic()
        deadlines = [began + 1000 + index for index in range(6)]
        clock = StageClock()
        answers = await asyncio.gather(*(scoring.score(lesions, model, deadline, clock) for deadline in deadlines))
        assert [len(scored) for scored, _ in answers] == [9] * 6
        assert nodes.order == deadlines and nodes.most == 2
        # Small ones go beside them.
        nodes.most = 0
        small = {0: lesions[0]}
        requests = [lesions, lesions, lesions, small, small]
        await asyncio.gather(
            *(scoring.score(request, model, began + 2000 + index, clock) for index, request in enumerate(requests))
        )
        assert nodes.order.index(began + 2003) < nodes.order.index(began + 2002)
        assert nodes.order.index(began + 2004) < nodes.order.index(began + 2002)

    asyncio.run(scenario())


def test_the_rate_of_one_request_refuses_the_next_that_could_not_end_in_time(monkeypatch):
    monkeypatch.setattr(large_requests, "_ENOUGH_S", 0.01)

    async def scenario():
        nodes = Nodes(seconds=0.02)
        scoring = LesionScoring(nodes, nodes, UploadLimits(), IngressSettings(), max_batch_size=4)
        model = SimpleNamespace(digest="digest", input_size=32, abstention=None)
        lesions = {index: LesionRequest(lesion_image()) for index in range(100)}
        later = time.monotonic() + 1000
        first = asyncio.create_task(scoring.score(lesions, model, later, StageClock()))
        while nodes.calls < 10:
            await asyncio.sleep(0.005)
        soon = time.monotonic() + 0.02
        with pytest.raises(ApiError, match="100 pictures"):
            await scoring.score(lesions, model, soon, StageClock())
        assert soon not in nodes.order
        assert len((await first)[0]) == 100

    asyncio.run(scenario())
