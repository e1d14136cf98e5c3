"""While a network learns, the executor that feeds it leaves the cores to it; and it never waits while there is work."""

import time
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import psutil
import pytest

from data_pipelines import executor_pacing
from data_pipelines.executor_pacing import PAUSE_SECONDS, PauseUnderBackpressure
from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.hdf5_index import build_index

NUM_ROWS = 4096
WATCHED_SECONDS = 2.0


def operator(tasks, held_back):
    return SimpleNamespace(num_active_tasks=lambda: tasks, _in_task_output_backpressure=held_back)


@pytest.mark.parametrize(
    ("operators", "pauses"),
    [
        ([operator(0, False), operator(2, True)], 1),  # blocks wait for room
        ([operator(0, False), operator(0, False)], 1),  # all are read, the consumer is not done
        ([operator(0, True), operator(2, False)], 0),
        ([operator(1, True), operator(2, False)], 0),
    ],
)
def test_it_waits_only_when_no_task_can_give_anything(monkeypatch, operators, pauses):
    waited = []
    monkeypatch.setattr(executor_pacing.time, "sleep", waited.append)
    PauseUnderBackpressure().on_execution_step(SimpleNamespace(_topology=operators))
    assert waited == [PAUSE_SECONDS] * pauses


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("pacing") / "train-image.hdf5")
    with h5py.File(path, "w") as file:
        picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
        file.create_dataset("ISIC_0000000", data=np.void(cv2.imencode(".png", picture)[1].tobytes()))
    index, one = build_index(path), np.zeros(NUM_ROWS, np.int64)
    rows = ImageRows(index.ids[one], index.offset[one], index.size[one], one)
    return LesionImageDatasource(path, rows, DecodeRecipe(32))


@pytest.mark.ray
def test_an_executor_whose_consumer_is_busy_takes_a_fraction_of_the_time(ray_connected, monkeypatch, source):
    from ray.util.state import list_actors

    from data_pipelines import image_dataset

    earlier = set()

    def share_of_a_core():
        """CPU seconds per second of the actor that holds a train worker's executor, while that does something else."""
        (shard,) = image_dataset.read_images(source).streaming_split(1, equal=True)
        batches = iter(shard.iter_batches(batch_size=32))
        next(batches)
        coordinators = list_actors(filters=[("class_name", "=", "SplitCoordinator"), ("state", "=", "ALIVE")])
        (pid,) = {actor.pid for actor in coordinators} - earlier
        earlier.add(pid)
        process = psutil.Process(pid)
        used, started = sum(process.cpu_times()[:2]), time.monotonic()
        time.sleep(WATCHED_SECONDS)
        share = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - started)
        assert 32 + sum(len(batch["row"]) for batch in batches) == NUM_ROWS
        return share

    paced = share_of_a_core()
    with_pacing = image_dataset.data_context

    def without_pacing(source):
        context = with_pacing(source)
        context.custom_execution_callback_classes = []
        return context

    monkeypatch.setattr(image_dataset, "data_context", without_pacing)
    assert paced < 0.5 * share_of_a_core()
