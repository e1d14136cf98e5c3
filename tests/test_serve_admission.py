"""A full service says no before it reads, says when to come back, and lets in again what it can answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from serve.admission import Admission, AdmissionGuard
from serve.settings import AdmissionSettings


class House:
    """An application behind the guard, whose requests stay until they are let go."""

    def __init__(self, **settings):
        self.wait_s = 0.0
        self.inside = 0
        self.bodies_read = 0
        self.leave = asyncio.Event()
        self.admission = Admission(AdmissionSettings(**settings), lambda: self.wait_s, retry_after_s=3)
        self.guard = AdmissionGuard(self._app, self.admission, ["/v1/predict"], largest_body=5 * 2**20)

    async def _app(self, scope, receive, send):
        self.inside += 1
        await self.leave.wait()
        self.inside -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, length: int | None = 100, path: str = "/v1/predict", method: str = "POST"):
        """(status, headers, body) of one request."""
        sent = []

        async def receive():
            self.bodies_read += 1
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message):
            sent.append(message)

        headers = [] if length is None else [(b"content-length", str(length).encode())]
        await self.guard({"type": "http", "path": path, "method": method, "headers": headers}, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def started(*tasks):
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def refused(answer) -> str:
    status, headers, body = answer
    assert status == 503 and headers[b"retry-after"] == b"3"
    problem = json.loads(body)
    assert problem["error"] == "unavailable"
    return problem["detail"]


def test_no_more_requests_than_allowed_are_inside_and_each_that_leaves_makes_room():
    async def scenario():
        house = House(max_requests=2)
        inside = [asyncio.create_task(house.ask()) for _ in range(2)]
        await started(*inside)
        assert "2 requests are under way" in refused(await house.ask())
        assert house.admission.num_refused == 1
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(*inside)] == [200, 200]
        assert (house.admission.num_requests, house.admission.num_bytes) == (0, 0)
        assert (await house.ask())[0] == 200

    asyncio.run(scenario())


def test_bodies_together_stay_below_the_limit_but_one_alone_is_let_in():
    async def scenario():
        house = House(max_bytes=4 * 2**20)
        first = asyncio.create_task(house.ask(3 * 2**20))
        await started(first)
        assert "max_bytes" in refused(await house.ask(2 * 2**20))
        # An unknown length counts as the largest one.
        assert "max_bytes" in refused(await house.ask(None))
        small = asyncio.create_task(house.ask(2**20))
        await started(small)
        assert house.inside == 2
        house.leave.set()
        await asyncio.gather(first, small)
        assert (await house.ask(5 * 2**20))[0] == 200

    asyncio.run(scenario())


def test_an_old_queue_refuses_and_a_young_one_lets_in():
    async def scenario():
        house = House(max_wait_s=0.4)
        house.leave.set()
        house.wait_s = 0.5
        assert "wait 0.5 s for the network" in refused(await house.ask())
        assert house.bodies_read == 1, "an unread body breaks the client's connection"
        house.wait_s = 0.3
        assert (await house.ask())[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(("path", "method"), [("/readyz", "GET"), ("/v1/model", "GET"), ("/v1/predict", "OPTIONS")])
def test_what_needs_no_network_is_let_in_when_the_service_is_full(path, method):
    async def scenario():
        house = House(max_requests=1)
        house.wait_s = 100.0
        house.leave.set()
        assert (await house.ask(path=path, method=method))[0] == 200

    asyncio.run(scenario())


def test_a_request_that_breaks_off_leaves_its_room():
    async def scenario():
        house = House(max_requests=1)
        task = asyncio.create_task(house.ask())
        await started(task)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        house.leave.set()
        assert (await house.ask())[0] == 200

    asyncio.run(scenario())
