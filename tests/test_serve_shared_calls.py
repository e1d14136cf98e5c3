"""Commits are shared, keep the order, and outlive callers that go away."""

from __future__ import annotations

import asyncio

import pytest

from serve.shared_calls import SharedCalls


class Slow:
    """A commit that waits for a permit, and remembers its groups."""

    def __init__(self):
        self.groups: list[list] = []
        self.permits = asyncio.Semaphore(0)

    async def __call__(self, items):
        self.groups.append(items)
        await self.permits.acquire()
        return [f"done {item}" for item in items]


async def started(*tasks):
    """Lets the tasks run until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_what_arrives_during_a_commit_shares_the_next_one():
    async def scenario():
        commit = Slow()
        group = SharedCalls(commit, size=lambda item: 1)
        first = asyncio.create_task(group.submit(0))
        await started(first)
        others = [asyncio.create_task(group.submit(item)) for item in range(1, 6)]
        await started(*others)
        assert commit.groups == [[0]]
        commit.permits.release()
        commit.permits.release()
        assert await asyncio.gather(first, *others) == [f"done {item}" for item in range(6)]
        assert commit.groups == [[0], [1, 2, 3, 4, 5]]

    asyncio.run(scenario())


def test_groups_are_bounded_in_items_and_bytes_but_never_empty():
    async def scenario():
        commit = Slow()
        for _ in range(10):
            commit.permits.release()
        group = SharedCalls(commit, size=lambda item: item, max_items=3, max_size=10)
        await asyncio.gather(*(group.submit(item) for item in [1, 1, 1, 1, 50, 9, 2]))
        assert commit.groups == [[1, 1, 1], [1], [50], [9], [2]]

    asyncio.run(scenario())


def test_a_caller_that_goes_away_stops_no_one():
    async def scenario():
        commit = Slow()
        group = SharedCalls(commit, size=lambda item: 1)
        gone = asyncio.create_task(group.submit("gone"))
        await started(gone)
        waiting = asyncio.create_task(group.submit("waiting"))
        also_gone = asyncio.create_task(group.submit("also gone"))
        await started(waiting, also_gone)
        gone.cancel()
        also_gone.cancel()
        await started(gone, also_gone)
        for _ in range(3):
            commit.permits.release()
        assert await asyncio.wait_for(waiting, 5) == "done waiting"
        assert await asyncio.wait_for(group.submit("later"), 5) == "done later"
        # What was submitted is committed, whoever still wants to know.
        assert commit.groups == [["gone"], ["waiting", "also gone"], ["later"]]

    asyncio.run(scenario())


def test_errors_reach_those_they_belong_to_and_the_next_group_goes_on():
    async def commit(items):
        if "all" in items:
            raise OSError("disk full")
        return [ValueError(item) if item == "bad" else item for item in items]

    async def scenario():
        group = SharedCalls(commit, size=lambda item: 1)
        results = await asyncio.gather(*map(group.submit, ["good", "bad"]), return_exceptions=True)
        assert results[0] == "good" and isinstance(results[1], ValueError)
        for error in await asyncio.gather(*map(group.submit, ["all", "x"]), return_exceptions=True):
            assert isinstance(error, OSError)
        assert await group.submit("again") == "again"

    asyncio.run(scenario())


def test_a_commit_that_is_cancelled_fails_its_callers_and_the_rest_is_still_committed():
    async def scenario():
        calls = []

        async def commit(items):
            calls.append(items)
            if len(calls) == 1:
                await asyncio.sleep(0)
                raise asyncio.CancelledError
            return items

        group = SharedCalls(commit, size=lambda item: 1, max_items=1)
        first, second = await asyncio.wait_for(
            asyncio.gather(group.submit(1), group.submit(2), return_exceptions=True), 5
        )
        assert isinstance(first, RuntimeError)
        assert second == 2

    asyncio.run(scenario())


def test_commits_do_not_run_in_a_callers_context():
    """In Ray Serve a task that inherits a request's context is cancelled with that request."""
    import contextvars

    request = contextvars.ContextVar("request", default="none")
    seen = []

    async def commit(items):
        seen.append(request.get())
        return items

    async def scenario():
        request.set("a client's request")
        await SharedCalls(commit, size=lambda item: 1).submit(1)

    asyncio.run(scenario())
    assert seen == ["none"]


def test_a_wrong_number_of_results_is_an_error_not_a_hang():
    async def commit(items):
        return []

    with pytest.raises(RuntimeError, match="0 results for 1 items"):
        asyncio.run(asyncio.wait_for(SharedCalls(commit, size=lambda item: 1).submit(1), 5))


def test_so_many_calls_are_under_way_and_the_next_item_waits_for_one_to_end():
    async def scenario():
        call = Slow()
        shared = SharedCalls(call, size=lambda item: 1, concurrency=2, max_items=4)
        tasks = []
        for item in range(6):
            tasks.append(asyncio.create_task(shared.submit(item)))
            await started(*tasks)
        assert call.groups == [[0], [1]]
        assert shared.oldest_wait_s() > 0
        call.permits.release()
        await started(*tasks)
        assert call.groups == [[0], [1], [2, 3, 4, 5]] and shared.oldest_wait_s() == 0
        for _ in range(2):
            call.permits.release()
        assert await asyncio.gather(*tasks) == [f"done {item}" for item in range(6)]

    asyncio.run(scenario())


def test_a_patient_item_shares_the_next_call_and_gets_its_own_when_that_takes_too_long():
    async def scenario():
        call = Slow()
        shared = SharedCalls(call, size=lambda item: 1, concurrency=2, patience_s=0.05)
        first = asyncio.create_task(shared.submit("first"))
        await started(first)
        second, third = asyncio.create_task(shared.submit("second")), asyncio.create_task(shared.submit("third"))
        await started(second, third)
        assert call.groups == [["first"]]
        async with asyncio.timeout(10):
            while len(call.groups) < 2:
                await asyncio.sleep(0.005)
        assert call.groups == [["first"], ["second", "third"]]
        for _ in range(2):
            call.permits.release()
        await asyncio.gather(first, second, third)
        # Nothing is under way: no reason to wait.
        last = asyncio.create_task(shared.submit("last"))
        await started(last)
        assert call.groups[-1] == ["last"]
        call.permits.release()
        assert await last == "done last"

    asyncio.run(scenario())


def test_what_nobody_waits_for_is_not_sent():
    async def scenario():
        call = Slow()
        shared = SharedCalls(call, size=lambda item: 1, keep_cancelled=False)
        first, gone, last = (asyncio.create_task(shared.submit(item)) for item in ("first", "gone", "last"))
        await started(first)
        # The first group took all three; a second one forms behind it.
        behind, left = asyncio.create_task(shared.submit("behind")), asyncio.create_task(shared.submit("left"))
        await started(behind, left)
        behind.cancel()
        gone.cancel()
        await started(behind, gone)
        for _ in range(2):
            call.permits.release()
        assert await asyncio.gather(first, last, left) == ["done first", "done last", "done left"]
        assert call.groups == [["first", "gone", "last"], ["left"]]

    asyncio.run(scenario())


def test_a_call_that_nobody_waits_for_any_more_is_cancelled_and_the_next_goes_on():
    async def scenario():
        cancelled = []

        async def call(items):
            try:
                if items != ["next"]:
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(items)
                raise
            return items

        shared = SharedCalls(call, size=lambda item: 1, keep_cancelled=False)
        tasks = [asyncio.create_task(shared.submit(item)) for item in ("a", "b")]
        await started(*tasks)
        tasks[0].cancel()
        await started(*tasks)
        assert cancelled == [], "someone still waits"
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.wait_for(shared.submit("next"), 5) == "next"
        assert cancelled == [["a", "b"]]

    asyncio.run(scenario())


def test_what_does_not_fit_into_a_call_gets_the_next_when_it_has_waited_long_enough():
    async def scenario():
        call = Slow()
        shared = SharedCalls(call, size=lambda item: 1, max_size=2, concurrency=4, patience_s=0.02)
        tasks = [asyncio.create_task(shared.submit(item)) for item in range(8)]
        async with asyncio.timeout(10):
            while len(call.groups) < 4:
                await asyncio.sleep(0.005)
        for _ in range(4):
            call.permits.release()
        assert await asyncio.gather(*tasks) == [f"done {item}" for item in range(8)]

    asyncio.run(scenario())


def test_items_that_are_enough_for_a_call_wait_for_no_others():
    async def scenario():
        call = Slow()
        shared = SharedCalls(call, size=lambda item: item, concurrency=2, patience_s=60, enough=8)
        tasks = [asyncio.create_task(shared.submit(1))]
        await started(*tasks)
        tasks += [asyncio.create_task(shared.submit(item)) for item in (5, 2)]
        await started(*tasks)
        assert call.groups == [[1]], "7 together wait for the call under way, or for more"
        tasks.append(asyncio.create_task(shared.submit(1)))
        await started(*tasks)
        assert call.groups == [[1], [5, 2, 1]]
        call.permits.release()
        call.permits.release()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
