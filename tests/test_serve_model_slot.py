"""A replica keeps answering with the model it has, whatever becomes of the next one."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.model_slot import ModelSlot
from serve.settings import ModelReference


def config(version, uri="/bundles/x"):
    return ModelReference(bundle_uri=uri, sha256="0" * 64, version=version).model_dump()


class Bundles:
    """Loads a model by its version, unless it is broken."""

    def __init__(self):
        self.loads = []
        self.broken = {}
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, reference):
        assert self.gate.wait(10)
        self.loads.append(reference.version)
        if reference.version in self.broken:
            raise self.broken[reference.version]
        return f"model {reference.version}"


def run(scenario):
    """Runs `scenario(slot, bundles)` with version 1 served."""

    async def steps():
        bundles = Bundles()
        slot = ModelSlot(bundles)
        assert await slot.use(config("1")) == "model 1"
        await scenario(slot, bundles)

    asyncio.run(steps())


def test_a_prepared_model_is_taken_without_loading_it_again():
    async def scenario(slot, bundles):
        assert await slot.prepare(config("2")) is None
        assert await slot.prepare(config("2")) is None
        assert slot.model == "model 1"
        bundles.broken["2"] = ValueError("removed since")
        assert await slot.use(config("2")) == slot.model == "model 2"
        assert bundles.loads == ["1", "2"]
        assert slot.state() == {"model": config("2"), "refused": None}

    run(scenario)


def test_a_model_that_does_not_load_leaves_the_old_one_and_says_why():
    async def scenario(slot, bundles):
        bundles.broken = {"2": ValueError("bundle /x:\nmodel_card.md missing; refused"), "3": MemoryError("4 GB")}
        assert await slot.prepare(config("2")) == "bundle /x: model_card.md missing; refused"
        assert await slot.prepare(config("3")) == "MemoryError: 4 GB"
        assert slot.state() == {"model": config("1"), "refused": None}
        assert await slot.use(config("2")) == slot.model == "model 1"
        assert slot.state()["refused"] == {
            "model": config("2"),
            "reason": "bundle /x: model_card.md missing; refused",
        }
        assert await slot.use(config("1")) == "model 1"
        assert slot.state() == {"model": config("1"), "refused": None}

    run(scenario)


def test_a_replica_without_an_old_model_fails():
    bundles = Bundles()
    bundles.broken["1"] = ValueError("no bundle")
    with pytest.raises(ValueError, match="no bundle"):
        asyncio.run(ModelSlot(bundles).use(config("1")))


def test_the_same_model_is_not_loaded_twice_and_one_from_elsewhere_is():
    async def scenario(slot, bundles):
        await slot.use(config("1"))
        assert bundles.loads == ["1"]
        await slot.use(config("1", uri="/bundles/y"))
        assert bundles.loads == ["1", "1"]

    run(scenario)


def test_the_old_model_serves_while_the_next_one_is_loaded():
    async def scenario(slot, bundles):
        bundles.gate.clear()
        loading = asyncio.create_task(slot.prepare(config("2")))
        await asyncio.sleep(0)
        assert slot.model == "model 1" and not loading.done()
        # The switch comes while the model is still being loaded, and waits for it.
        switching = asyncio.create_task(slot.use(config("2")))
        await asyncio.sleep(0)
        assert slot.model == "model 1"
        bundles.gate.set()
        assert (await loading, await switching) == (None, "model 2")
        assert bundles.loads == ["1", "2"]

    run(scenario)


@pytest.mark.parametrize("how", ["dropped", "expired", "another"])
def test_a_prepared_model_that_nobody_takes_is_freed(how):
    async def steps():
        bundles = Bundles()
        slot = ModelSlot(bundles, prepared_s=0.01 if how == "expired" else 900)
        await slot.use(config("1"))
        await slot.prepare(config("2"))
        if how == "dropped":
            slot.drop_prepared()
        elif how == "another":
            await slot.use(config("3"))
        else:
            async with asyncio.timeout(10):
                while slot._prepared is not None:
                    await asyncio.sleep(0.01)
        assert slot._prepared is None
        await slot.use(config("2"))
        assert bundles.loads.count("2") == 2

    asyncio.run(steps())
