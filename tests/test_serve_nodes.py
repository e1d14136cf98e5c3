"""Requests that wait together share a call, and each gets its own rows back, with its own deadline's worth of time."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from serve.errors import ApiError
from serve.image_scorer import ImageScores
from serve.metadata_fusion import FusedRisk, FusedRisks
from serve.nodes import FusionNode, ScorerNode
from serve.settings import ScorerSettings

SIZE = 4


class Response:
    """What a handle's method returns: awaited for the answer, cancelled by whoever gives up."""

    def __init__(self, work):
        self._task = asyncio.ensure_future(work)
        self.cancelled = False

    def __await__(self):
        return asyncio.shield(self._task).__await__()

    def cancel(self):
        self.cancelled = True
        self._task.cancel()


class Method:
    def __init__(self, call):
        self._call = call
        self.deployment_name = "Node"
        self.responses = []

    def remote(self, *arguments):
        self.responses.append(Response(self._call(*arguments)))
        return self.responses[-1]


class Handle:
    """A deployment handle whose methods are coroutine functions of this process."""

    def __init__(self, **methods):
        for name, call in methods.items():
            setattr(self, name, Method(call))
        self.explain = self.describe = self.fuse_patient = None

    def options(self, **_):
        return self


class Network:
    """Scores a picture by its first value; remembers its calls, which wait while `gate` is closed."""

    def __init__(self):
        self.calls = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, images, time_left_s, request_ids=()):
        self.calls.append((len(images), time_left_s))
        await self.gate.wait()
        value = images[:, 0, 0, 0].astype(np.float32)
        return ImageScores("digest", np.stack([value, -value], axis=1), np.zeros((len(images), 64), np.float32))


def pictures(*values):
    return np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in values])


def scorer(network, **settings):
    return ScorerNode(Handle(score=network), ScorerSettings(**settings), retry_after_s=3)


def test_pictures_of_several_requests_go_in_one_call_and_each_gets_its_own_rows():
    async def scenario():
        network = Network()
        node = scorer(network)
        network.gate.clear()
        now = time.monotonic()
        first = asyncio.create_task(node.score(pictures(1), now + 9))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = [
            asyncio.create_task(node.score(pictures(*values), now + left))
            for values, left in (((2, 3), 5), ((4,), 30), ((5, 6, 7), 10))
        ]
        await asyncio.sleep(0)
        network.gate.set()
        answers = await asyncio.gather(first, *others)
        assert [list(scores.log_probabilities[:, 0]) for scores in answers] == [[1], [2, 3], [4], [5, 6, 7]]
        assert [count for count, _ in network.calls] == [1, 6]
        # The time of the one who waits longest: the scorer must not drop what somebody still wants.
        assert 25 < network.calls[1][1] <= 30

    asyncio.run(scenario())


def test_no_call_has_more_pictures_than_the_network_takes_at_a_time():
    async def scenario():
        network = Network()
        node = scorer(network, max_batch_size=4, max_replicas=1, target_ongoing_requests=1)
        deadline = time.monotonic() + 30
        await asyncio.gather(*(node.score(pictures(*[value] * 3), deadline) for value in range(6)))
        assert max(count for count, _ in network.calls) <= 4
        assert sum(count for count, _ in network.calls) == 18

    asyncio.run(scenario())


def test_an_answer_of_another_model_reaches_every_request_of_the_call():
    async def another(images, time_left_s, request_ids=()):
        return None

    async def scenario():
        node = ScorerNode(Handle(score=another), ScorerSettings(), retry_after_s=3)
        return await asyncio.gather(*(node.score(pictures(1), time.monotonic() + 5) for _ in range(3)))

    assert asyncio.run(scenario()) == [None] * 3


def test_a_call_that_all_clients_left_is_cancelled_at_the_scorer():
    async def scenario():
        network = Network()
        network.gate.clear()
        handle = Handle(score=network)
        node = ScorerNode(handle, ScorerSettings(), retry_after_s=3)
        tasks = [asyncio.create_task(node.score(pictures(1), time.monotonic() + 30)) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        (response,) = handle.score.responses
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert not response.cancelled
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        for _ in range(5):
            await asyncio.sleep(0)
        assert response.cancelled

    asyncio.run(scenario())


def test_a_call_whose_replica_died_is_made_again_and_a_full_queue_is_a_503(monkeypatch):
    monkeypatch.setattr("serve.nodes._RETRY_S", 0.0)
    failures = [RayActorError(), RayActorError()]

    async def dies(images, time_left_s, request_ids=()):
        if failures:
            raise failures.pop()
        return await Network()(images, time_left_s)

    async def full(images, time_left_s, request_ids=()):
        raise BackPressureError(num_queued_requests=9, max_queued_requests=8)

    async def scenario():
        node = ScorerNode(Handle(score=dies), ScorerSettings(), retry_after_s=3)
        scores = await node.score(pictures(8), time.monotonic() + 5)
        assert scores.log_probabilities[0, 0] == 8 and failures == []
        node = ScorerNode(Handle(score=full), ScorerSettings(), retry_after_s=3)
        with pytest.raises(ApiError) as caught:
            await node.score(pictures(8), time.monotonic() + 5)
        assert (caught.value.status, caught.value.retry_after_s) == (503, 3)

    asyncio.run(scenario())


def test_lesions_of_several_requests_are_fused_in_one_call():
    calls = []

    async def fuse(log_probabilities, records, request_ids=()):
        calls.append(len(records))
        risks = [FusedRisk("none", {}, float(row[0]), "low", 0.5) for row in log_probabilities]
        return FusedRisks("digest", risks)

    async def scenario():
        handle = Handle(fuse=fuse)
        node = FusionNode(handle, retry_after_s=3)
        rows = [np.array([[1.0, 0]]), np.array([[2.0, 0], [3.0, 0]]), np.array([[4.0, 0]])]
        return await asyncio.gather(*(node.fuse(part, [{}] * len(part)) for part in rows))

    answers = asyncio.run(scenario())
    assert [[risk.risk for risk in answer.risks] for answer in answers] == [[1], [2, 3], [4]]
    assert {answer.digest for answer in answers} == {"digest"}
    assert calls == [4]


def test_pictures_of_two_input_sizes_wait_together_while_a_model_is_rolled_out():
    async def scenario():
        network = Network()
        network.gate.clear()
        node = scorer(network, max_replicas=1, target_ongoing_requests=1, patience_s=30)
        deadline = time.monotonic() + 30
        first = asyncio.create_task(node.score(pictures(1), deadline))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        large = np.full((1, 2 * SIZE, 2 * SIZE, 3), 3, np.uint8)
        others = [asyncio.create_task(node.score(images, deadline)) for images in (pictures(2), large, pictures(4))]
        await asyncio.sleep(0)
        network.gate.set()
        answers = await asyncio.gather(first, *others)
        assert [scores.log_probabilities[0, 0] for scores in answers] == [1, 2, 3, 4]
        assert [count for count, _ in network.calls] == [1, 2, 1]

    asyncio.run(scenario())


def test_scores_that_cannot_be_fused_fail_alone():
    async def fuse(log_probabilities, records, request_ids=()):
        if np.isnan(log_probabilities).any():
            raise ValueError("NaN")
        return FusedRisks("digest", [FusedRisk("none", {}, float(row[0]), "low", 0.5) for row in log_probabilities])

    async def scenario():
        node = FusionNode(Handle(fuse=fuse), retry_after_s=3)
        rows = [np.array([[1.0, 0]]), np.array([[np.nan, 0]]), np.array([[3.0, 0]]), np.array([[4.0, 0, 0]])]
        return await asyncio.gather(*(node.fuse(part, [{}]) for part in rows), return_exceptions=True)

    good, bad, other, classes = asyncio.run(scenario())
    assert (good.risks[0].risk, other.risks[0].risk, classes.risks[0].risk) == (1, 3, 4)
    assert isinstance(bad, ValueError)
