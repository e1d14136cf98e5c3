"""A full service says no before it parses, says when to come back, and lets in again what it can answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from serve.admission import _LATE, _LOOK_S, Admission, AdmissionGuard
from serve.settings import AdmissionSettings
from serve.waiting_bodies import WaitingBodies

MIB = 2**20
LARGEST = 5 * MIB


class House:
    """An application behind the guard, whose requests stay until they are let go."""

    def __init__(self, **settings):
        self.wait_s = 0.0
        self.inside = self.most_inside = 0
        self.order = []
        self.bodies_read = 0
        self.leave = asyncio.Event()
        self.looks = 0
        self.bodies = []
        own = AdmissionSettings(**settings)
        self.admission = Admission(own, self._oldest_wait_s, retry_after_s=3)
        self.waiting = WaitingBodies(own, self.admission.refusal)
        self.guard = AdmissionGuard(self._app, self.admission, self.waiting, {"/v1/predict": LARGEST})

    def _oldest_wait_s(self) -> float:
        self.looks += 1
        return self.wait_s

    async def _app(self, scope, receive, send):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.order += [value for _, value in scope["headers"]]
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        self.bodies.append(body + message["body"])
        try:
            await self.leave.wait()
            # So that another one would be seen if it came in too early.
            await asyncio.sleep(0)
        finally:
            self.inside -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(
        self,
        length: int = 100,
        path: str = "/v1/predict",
        method: str = "POST",
        announce: bool = True,
        rest: asyncio.Queue | None = None,
    ):
        """(status, headers, body) of one request; what `rest` gives follows its first `length` bytes, until b""."""
        sent, read = [], 0

        async def receive():
            nonlocal read
            self.bodies_read += 1
            read += 1
            if read == 1:
                return {"type": "http.request", "body": bytes(length), "more_body": rest is not None}
            if rest is None:
                # The client waits for its answer.
                return await asyncio.get_running_loop().create_future()
            piece = await rest.get()
            if piece is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": piece, "more_body": piece != b""}

        async def send(message):
            sent.append(message)

        headers = [(b"content-length", str(length).encode())] if announce and rest is None else []
        await self.guard({"type": "http", "path": path, "method": method, "headers": headers}, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]

    def check_empty(self):
        assert (self.admission.num_requests, self.admission.num_bytes) == (0, 0)
        assert (self.waiting.num_uploads, self.waiting.num_bytes) == (0, 0)


async def started(*tasks):
    for _ in range(20):
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
        assert (house.inside, house.waiting.num_bytes) == (2, 300)
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(*tasks)] == [200] * 5
        assert house.most_inside == 2
        assert house.admission.num_refused == 0
        house.check_empty()

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


def test_when_the_first_in_line_comes_too_late_the_last_goes_first():
    """Else everyone who gets in has waited as long as one may, and is answered late."""

    async def scenario():
        house = House(max_requests=1, patience_s=0.4, refuse_after_s=0.4)
        inside = asyncio.create_task(house.ask(1))
        await started(inside)
        early = asyncio.create_task(house.ask(2))
        await started(early)
        loop = asyncio.get_running_loop()
        late = loop.time() + 0.4 * _LATE
        while loop.time() <= late:
            await asyncio.sleep(0.005)
        others = [asyncio.create_task(house.ask(length)) for length in (3, 4)]
        await started(*others)
        house.leave.set()
        answers = await asyncio.gather(inside, early, *others)
        assert house.order[:2] == [b"1", b"4"]
        assert answers[0][0] == answers[3][0] == 200

    asyncio.run(scenario())


def test_who_waits_too_long_is_refused_and_told_when_to_come_back():
    async def scenario():
        house = House(max_requests=1, **AT_ONCE)
        inside = asyncio.create_task(house.ask())
        await started(inside)
        assert "no place in 0.01 s" in refused(await house.ask())
        assert house.admission.num_refused == 1
        assert house.bodies_read == 2, "an unread body breaks the client's connection"
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


def test_bodies_inside_stay_below_the_limit_together_but_one_alone_is_let_in():
    async def scenario():
        house = House(max_bytes=4 * MIB, **AT_ONCE)
        first = asyncio.create_task(house.ask(3 * MIB))
        await started(first)
        refused(await house.ask(2 * MIB))
        # What came without its length weighs what it was.
        small = asyncio.create_task(house.ask(MIB, announce=False))
        await started(small)
        assert house.inside == 2
        house.leave.set()
        await asyncio.gather(first, small)
        assert (await house.ask(5 * MIB))[0] == 200
        house.check_empty()

    asyncio.run(scenario())


@pytest.mark.parametrize("ending", ["complete", "gone"])
def test_a_slow_upload_holds_no_place(ending):
    async def scenario():
        house = House(max_requests=1, **AT_ONCE)
        rest = asyncio.Queue()
        slow = asyncio.create_task(house.ask(10, rest=rest))
        await started(slow)
        quick = asyncio.create_task(house.ask())
        await started(quick)
        assert (house.inside, house.waiting.num_uploads) == (1, 1)
        house.leave.set()
        assert (await quick)[0] == 200
        for piece in (b"abc", b"d", b""):
            rest.put_nowait(piece if ending == "complete" else None)
        assert (await slow)[0] == (200 if ending == "complete" else 400)
        if ending == "complete":
            assert house.bodies[-1] == bytes(10) + b"abcd"
        house.check_empty()

    asyncio.run(scenario())


def test_a_body_that_comes_byte_by_byte_is_kept_and_given_on_in_large_pieces():
    async def scenario():
        house = House()
        house.leave.set()
        rest = asyncio.Queue()
        data = bytes(range(256)) * 600
        for byte in data:
            rest.put_nowait(bytes([byte]))
        rest.put_nowait(b"")
        assert (await house.ask(0, rest=rest))[0] == 200
        assert house.bodies == [data]

    asyncio.run(scenario())


def test_bodies_outside_stay_below_the_limit_and_a_refusal_is_sent_at_once():
    async def scenario():
        house = House(max_requests=1, max_waiting_bytes=6 * MIB, patience_s=60.0)
        inside = asyncio.create_task(house.ask())
        waits = asyncio.create_task(house.ask(3 * MIB))
        await started(inside, waits)
        assert house.waiting.num_bytes == 3 * MIB
        detail = refused(await asyncio.wait_for(house.ask(3 * MIB + 1), 5))
        assert "max_waiting_bytes" in detail and str(3 * MIB) in detail
        # Nobody knows how long it is: it counts as the largest.
        refused(await asyncio.wait_for(house.ask(1, announce=False), 5))
        fits = asyncio.create_task(house.ask(3 * MIB))
        await started(fits)
        assert house.waiting.num_bytes == 6 * MIB
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(inside, waits, fits)] == [200] * 3
        assert house.admission.num_refused == 2
        house.check_empty()

    asyncio.run(scenario())


def test_a_body_that_outgrows_the_room_left_while_it_comes_is_refused_and_read_to_its_end():
    async def scenario():
        house = House(max_requests=1, max_waiting_bytes=6 * MIB, patience_s=60.0)
        rest = asyncio.Queue()
        inside = asyncio.create_task(house.ask())
        grows = asyncio.create_task(house.ask(MIB, rest=rest))
        await started(inside, grows)
        waits = asyncio.create_task(house.ask(4 * MIB))
        await started(waits)
        rest.put_nowait(bytes(2 * MIB))
        await started(grows)
        assert house.waiting.num_bytes == 4 * MIB and not grows.done()
        rest.put_nowait(b"")
        assert "max_waiting_bytes" in refused(await grows)
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(inside, waits)] == [200] * 2
        house.check_empty()

    asyncio.run(scenario())


def test_so_many_uploads_are_under_way_and_no_more():
    async def scenario():
        house = House(max_uploads=2)
        house.leave.set()
        rests = [asyncio.Queue() for _ in range(2)]
        slow = [asyncio.create_task(house.ask(1, rest=rest)) for rest in rests]
        await started(*slow)
        assert "max_uploads" in refused(await house.ask())
        slow[0].cancel()
        await started(*slow)
        assert (await house.ask())[0] == 200
        rests[1].put_nowait(b"")
        assert (await slow[1])[0] == 200
        await asyncio.gather(*slow, return_exceptions=True)
        house.check_empty()

    asyncio.run(scenario())


async def closed(house):
    """One request inside and one in the line, which only the age of the next picture keeps out."""
    house.wait_s = 10.0
    inside = asyncio.create_task(house.ask())
    await started(inside)
    waits = asyncio.create_task(house.ask())
    await started(waits)
    assert house.inside == 1
    return inside, waits


def test_the_door_that_opens_while_nobody_leaves_lets_in_who_waits():
    async def scenario():
        house = House(**LONG)
        inside, waits = await closed(house)
        house.wait_s = 0.0
        async with asyncio.timeout(5):
            while house.inside < 2:
                await asyncio.sleep(0.005)
        house.leave.set()
        await asyncio.gather(inside, waits)

    asyncio.run(scenario())


def test_the_door_that_opens_lets_in_the_line_and_who_comes_in_that_moment():
    async def scenario():
        house = House(max_waiting=1, **LONG)
        inside, waits = await closed(house)
        house.wait_s = 0.0
        comes = asyncio.create_task(house.ask())
        await started(comes)
        assert house.inside == 3
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(inside, waits, comes)] == [200] * 3

    asyncio.run(scenario())


def test_who_has_waited_long_enough_is_let_in_if_the_door_is_open_then():
    async def scenario():
        # Shorter than the time between two looks.
        house = House(patience_s=0.02, refuse_after_s=0.0)
        inside, waits = await closed(house)
        house.wait_s = 0.0
        async with asyncio.timeout(5):
            while house.inside < 2 and not waits.done():
                await asyncio.sleep(0.005)
        house.leave.set()
        assert [answer[0] for answer in await asyncio.gather(waits, inside)] == [200] * 2

    asyncio.run(scenario())


def test_someone_looks_only_while_there_is_a_line_and_not_all_the_time(monkeypatch):
    async def scenario():
        house = House(**LONG)
        inside, waits = await closed(house)
        before, began = house.looks, asyncio.get_running_loop().time()
        await asyncio.sleep(0.3)
        passed = asyncio.get_running_loop().time() - began
        assert 1 <= house.looks - before <= passed / _LOOK_S + 1
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        loop = asyncio.get_running_loop()
        call_later, later = loop.call_later, []

        def noted(delay, callback, *arguments, **options):
            later.append(callback)
            return call_later(delay, callback, *arguments, **options)

        monkeypatch.setattr(loop, "call_later", noted)
        # The look that was planned finds nobody.
        await asyncio.sleep(0.2)
        assert [callback for callback in later if getattr(callback, "__self__", None) is house.admission] == []
        house.leave.set()
        await inside

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
        house.check_empty()

    asyncio.run(scenario())


def test_who_went_away_while_waiting_is_not_worked_for():
    """Ahead of Serve a request goes on when its client has gone."""

    async def scenario():
        house = House(max_requests=1, **LONG)
        gone, here = asyncio.Queue(), asyncio.Queue()
        for line in (gone, here):
            line.put_nowait(b"")
        inside, first, second = (asyncio.create_task(house.ask(rest=rest)) for rest in (None, gone, here))
        await started(inside, first, second)
        gone.put_nowait(None)
        house.leave.set()
        assert (await second)[0] == (await inside)[0] == 200
        with pytest.raises(IndexError):
            await first  # No answer was sent.
        assert len(house.bodies) == 2
        house.check_empty()

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
        house.check_empty()

    asyncio.run(scenario())
