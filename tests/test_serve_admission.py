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
        self.inside = self.most_inside = 0
        self.order = []
        self.bodies_read = 0
        self.leave = asyncio.Event()
        self.admission = Admission(AdmissionSettings(**settings), lambda: self.wait_s, retry_after_s=3)
        self.guard = AdmissionGuard(self._app, self.admission, ["/v1/predict"], largest_body=5 * 2**20)

    async def _app(self, scope, receive, send):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.order += [value for _, value in scope["headers"]]
        try:
            await self.leave.wait()
            # So that another one would be seen if it came in too early.
            await asyncio.sleep(0)
        finally:
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


AT_ONCE = {"patience_s": 0.01, "refuse_after_s": 0.0}
"""Nobody waits outside for longer than a moment."""
LONG = {"patience_s": 60.0}


def test_no_more_requests_than_allowed_are_inside_and_each_that_leaves_makes_room():
    async def scenario():
        house = House(max_requests=2, **LONG)
        tasks = [asyncio.create_task(house.ask()) for _ in range(5)]
        await started(*tasks)
        assert (house.inside, house.bodies_read) == (2, 0)
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(*tasks)] == [200] * 5
        assert house.most_inside == 2
        assert (house.admission.num_requests, house.admission.num_bytes, house.admission.num_refused) == (0, 0, 0)

    asyncio.run(scenario())


def test_who_came_first_goes_in_first():
    async def scenario():
        house = House(max_requests=1, **LONG)
        tasks = [asyncio.create_task(house.ask(length)) for length in (1, 2, 3)]
        await started(*tasks)
        house.leave.set()
        await asyncio.gather(*tasks)
        assert house.order == [b"1", b"2", b"3"]

    asyncio.run(scenario())


def test_who_waits_too_long_is_refused_unread_and_told_when_to_come_back():
    async def scenario():
        house = House(max_requests=1, **AT_ONCE)
        inside = asyncio.create_task(house.ask())
        await started(inside)
        assert "no place in 0.01 s" in refused(await house.ask())
        assert house.admission.num_refused == 1
        assert house.bodies_read == 1, "an unread body breaks the client's connection"
        house.leave.set()
        await inside
        assert (await house.ask())[0] == 200

    asyncio.run(scenario())


def test_a_refusal_is_held_back_but_only_for_so_many():
    async def scenario():
        house = House(max_requests=1, patience_s=0.01, refuse_after_s=60.0, max_waiting=2)
        tasks = [asyncio.create_task(house.ask()) for _ in range(3)]
        await started(*tasks)
        assert "max_waiting" in refused(await house.ask())
        house.leave.set()
        done, held = await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert {task.result()[0] for task in done} == {200}
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert (await house.ask())[0] == 200

    asyncio.run(scenario())


def test_bodies_together_stay_below_the_limit_but_one_alone_is_let_in():
    async def scenario():
        house = House(max_bytes=4 * 2**20, **AT_ONCE)
        first = asyncio.create_task(house.ask(3 * 2**20))
        await started(first)
        refused(await house.ask(2 * 2**20))
        # An unknown length counts as the largest one.
        refused(await house.ask(None))
        small = asyncio.create_task(house.ask(2**20))
        await started(small)
        assert house.inside == 2
        house.leave.set()
        await asyncio.gather(first, small)
        assert (await house.ask(5 * 2**20))[0] == 200

    asyncio.run(scenario())


def test_nobody_is_let_in_while_pictures_wait_long_unless_the_house_is_empty():
    async def scenario():
        house = House(max_wait_s=0.4, **AT_ONCE)
        house.wait_s = 0.5
        first = asyncio.create_task(house.ask())
        await started(first)
        refused(await house.ask())
        house.wait_s = 0.3
        second = asyncio.create_task(house.ask())
        await started(second)
        assert house.inside == 2
        house.leave.set()
        await asyncio.gather(first, second)

    asyncio.run(scenario())


@pytest.mark.parametrize(("path", "method"), [("/readyz", "GET"), ("/v1/model", "GET"), ("/v1/predict", "OPTIONS")])
def test_what_needs_no_network_is_let_in_when_the_service_is_full(path, method):
    async def scenario():
        house = House(max_requests=1, **AT_ONCE)
        full = asyncio.create_task(house.ask())
        other = asyncio.create_task(house.ask(path=path, method=method))
        await started(full, other)
        assert house.inside == 2
        house.leave.set()
        assert (await other)[0] == (await full)[0] == 200

    asyncio.run(scenario())


def test_requests_that_break_off_inside_or_outside_leave_their_place_to_others():
    async def scenario():
        house = House(max_requests=1, **LONG)
        inside, outside, last = (asyncio.create_task(house.ask()) for _ in range(3))
        await started(inside, outside, last)
        outside.cancel()
        await started(outside)
        inside.cancel()
        await started(inside)
        assert house.inside == 1 and not last.done()
        house.leave.set()
        assert (await last)[0] == 200
        await asyncio.gather(inside, outside, return_exceptions=True)
        assert (house.admission.num_requests, house.admission.num_bytes) == (0, 0)

    asyncio.run(scenario())


def test_a_place_that_is_given_to_one_who_breaks_off_in_that_moment_goes_to_the_next():
    async def scenario():
        house = House(max_requests=1, **LONG)
        inside, second, third = (asyncio.create_task(house.ask()) for _ in range(3))
        await started(inside, second, third)
        # The first leaves and the second is called; before it runs, it is cancelled.
        house.leave.set()
        while not inside.done():
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert (await asyncio.wait_for(third, 5))[0] == 200
        assert (house.admission.num_requests, house.admission.num_bytes) == (0, 0)

    asyncio.run(scenario())
