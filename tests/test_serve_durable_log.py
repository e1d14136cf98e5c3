"""A record is on disk before its answer: in the store, else in the spool, which empties itself; else no answer."""

from __future__ import annotations

import asyncio
import time

import pytest

from monitoring.prediction_log import PredictionRecord
from serve.drift_logger import LogEntry, open_log
from serve.durable_log import DurableLog, LogUnavailableError
from serve.settings import DriftLoggerSettings
from store.database import StoreUnavailableError
from store.image_files import prepare_image
from tests.bundle_factory import LocalSidecar, lesion_image, storage

SETTINGS = DriftLoggerSettings(attempts=2, attempt_timeout_s=0.5, replay_interval_s=0.05)


def entry(index: int, key: str | None = None) -> LogEntry:
    image = prepare_image(lesion_image(index))
    record = PredictionRecord(model_version="1", context="none", image_hash=image.hash, idempotency_key=key)
    return LogEntry((record,), {image.hash: image.data})


@pytest.fixture
def places(dermray_home):
    return storage(dermray_home)


def stored_ids(places) -> set[str]:
    return {row["id"] for row in open_log(places).store.predictions_between(0, 2**62)}


async def until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.02)


def test_rows_and_images_are_in_the_store_when_write_returns(places):
    entries = [entry(index) for index in range(8)]

    async def scenario():
        sidecar = LocalSidecar(places)
        log = DurableLog(sidecar, open_log(places), SETTINGS)
        await asyncio.gather(*map(log.write, entries))
        assert [len(call) for call in sidecar.calls] == [8], "one call carries all that waits"

    asyncio.run(scenario())
    assert stored_ids(places) == {entry.records[0].id for entry in entries}
    files = open_log(places).image_files
    for one in entries:
        for name, data in one.images.items():
            assert files.get(name, ".jpg") == data


def test_a_failed_call_is_made_again_with_the_same_ids(places):
    one = entry(0)

    async def scenario():
        sidecar = LocalSidecar(places)
        write = sidecar.write

        async def committed_but_not_acknowledged(entries):
            await write(entries)
            sidecar.write = write
            raise ConnectionError("the replica died after its commit")

        sidecar.write = committed_but_not_acknowledged
        log = DurableLog(sidecar, open_log(places), SETTINGS)
        await log.write(one)
        assert len(sidecar.calls) == 2 and not log.spooling

    asyncio.run(scenario())
    assert stored_ids(places) == {one.records[0].id}


def test_while_the_sidecar_is_away_records_go_to_the_spool_and_come_back_when_it_answers(places):
    entries = [entry(index) for index in range(6)]

    async def scenario():
        sidecar = LocalSidecar(places)
        sidecar.down = StoreUnavailableError("the store is locked")
        log = DurableLog(sidecar, open_log(places), SETTINGS)
        await log.write(entries[0])
        assert log.spooling and await log.check() == "spooling"
        assert stored_ids(places) == set()
        # Known to be away: the rest does not wait for it.
        calls = len(sidecar.calls)
        await asyncio.gather(*map(log.write, entries[1:]))
        assert len(sidecar.calls) == calls
        sidecar.down = None
        await until(lambda: not log.spooling)
        assert await log.check() == "ok"

    asyncio.run(scenario())
    assert stored_ids(places) == {entry.records[0].id for entry in entries}
    assert open_log(places).spool.pending() == 0


def test_a_sidecar_that_hangs_is_not_waited_for_forever(places):
    async def scenario():
        sidecar = LocalSidecar(places)

        async def hang(entries):
            await asyncio.Event().wait()

        sidecar.write = hang
        log = DurableLog(sidecar, open_log(places), SETTINGS)
        await asyncio.wait_for(log.write(entry(0)), 5)
        assert open_log(places).spool.pending() == 1 or stored_ids(places)

    asyncio.run(scenario())


def test_without_store_and_spool_nothing_is_promised(places, dermray_home):
    (dermray_home / "spool").write_text("a file where the folder should be")

    async def scenario():
        sidecar = LocalSidecar(places)
        sidecar.down = ConnectionError("gone")
        log = DurableLog(sidecar, open_log(places), SETTINGS)
        with pytest.raises(LogUnavailableError, match="neither the store nor the spool"):
            await log.write(entry(0))
        # And it recovers as soon as one of them does.
        sidecar.down = None
        await log.write(entry(1))

    asyncio.run(scenario())
    assert len(stored_ids(places)) == 1


def test_a_new_replica_replays_what_a_dead_one_left(places):
    one = entry(0)
    open_log(places).spool_records(one.records, one.images)

    async def scenario():
        log = DurableLog(LocalSidecar(places), open_log(places), SETTINGS)
        log.start_replay()
        await until(lambda: open_log(places).spool.pending() == 0)

    asyncio.run(scenario())
    assert stored_ids(places) == {one.records[0].id}


def test_the_client_that_goes_away_leaves_its_record_and_the_next_ones_alone(places):
    entries = [entry(index) for index in range(3)]

    async def scenario():
        log = DurableLog(LocalSidecar(places), open_log(places), SETTINGS)
        tasks = [asyncio.create_task(log.write(one)) for one in entries]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait_for(tasks[2], 5)

    asyncio.run(scenario())
    assert stored_ids(places) == {entry.records[0].id for entry in entries}
