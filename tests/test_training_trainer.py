"""Real Ray Train runs: a killed worker resumes its epoch, workers share the rows, the gate split stays out."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from data_pipelines.augmentation import AugmentationConfig
from data_pipelines.image_dataset import open_dataset
from tests.dark_spots import prepare_dark_spots
from training.config import TrainingConfig
from training.trainer import build_trainer, fit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return open_dataset(prepare_dark_spots(tmp_path_factory.mktemp("lesions"), 120, 3, num_folds=2))


def config(epochs, epoch_rows, workers=1):
    return TrainingConfig.model_validate(
        {
            "model": {"weights": "package", "input_size": 32, "frozen_blocks": 3},
            "optimizer": {"epochs": epochs, "batch_size": 16, "learning_rate": 0.002, "ema_decay": 0.8},
            "sampling": {"epoch_rows": epoch_rows, "negatives_per_positive": 1},
            "augmentation": {"recipe": "none"},
            "workers": {"num_workers": workers, "cpus_per_worker": 0.5, "torch_threads": 1},
        }
    )


def train_worker_pids():
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", "RayTrainWorker")], detail=True)
    return [actor.pid for actor in actors]


def wait_until(condition, what, seconds=240):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)
    return value


def recording_loop(folder):
    """The train loop, noting which rows each worker sees in which epoch, and what their pictures look like after
    augmentation. Nested, so that it travels to the workers by value: they cannot import this file."""

    def loop(settings):
        import json
        import os
        import zlib

        import ray.train

        from training import worker

        rank, original = ray.train.get_context().get_world_rank(), worker.train_epoch

        def train_epoch(model, batches, *rest):
            def noted():
                for batch in batches:
                    pictures = [zlib.crc32(image.numpy().tobytes()) for image in batch["image"]]
                    line = {"epoch": int(batch["epoch"][0]), "rows": batch["row"].tolist(), "pictures": pictures}
                    with open(f"{folder}/rank{rank}-process{os.getpid()}.jsonl", "a") as file:
                        file.write(json.dumps(line) + "\n")
                    yield batch

            return original(model, noted(), *rest)

        worker.train_epoch = train_epoch
        worker.train_loop_per_worker(settings)

    return loop


def seen(folder):
    """(epoch, rank, process) -> batches, in the order they came."""
    found = {}
    for path in folder.glob("*.jsonl"):
        rank, process = path.stem.split("-")
        # A worker may be writing its last line, or was killed when it did.
        for line in path.read_text().split("\n")[:-1]:
            note = json.loads(line)
            found.setdefault((note.pop("epoch"), rank, process), []).append(note)
    return found


def recorded_trainer(settings, version, storage, name):
    folder = storage / f"seen-{name}"
    folder.mkdir()
    trainer = build_trainer(settings, version, 0, str(storage), name)
    trainer.train_loop_per_worker = recording_loop(str(folder))
    return trainer, folder


@pytest.mark.slow
@pytest.mark.parametrize("place", ["read_task", "device"])
def test_a_run_killed_in_its_second_epoch_sees_the_samples_of_an_unbroken_run(ray_connected, version, tmp_path, place):
    settings = config(3, 1200, workers=2)
    settings = settings.model_copy(update={"augmentation": AugmentationConfig(recipe="light", place=place), "seed": 5})
    unbroken, unbroken_folder = recorded_trainer(settings, version, tmp_path, "unbroken")
    fit(unbroken)
    expected = seen(unbroken_folder)
    assert len(expected) == 6
    killed, folder = recorded_trainer(settings, version, tmp_path, "killed")
    outcome = {}
    thread = threading.Thread(target=lambda: outcome.update(model=fit(killed)))
    thread.start()
    # The worker reports before it goes on, but Train's controller registers a report when it next polls.
    registered = tmp_path / "killed" / "checkpoint_manager_snapshot.json"

    def second_epoch():
        begun = [key for key, batches in seen(folder).items() if key[0] == 1 and len(batches) >= 3]
        return begun and registered.exists()

    wait_until(second_epoch, "second epoch")
    os.kill(wait_until(train_worker_pids, "train worker")[0], signal.SIGKILL)
    thread.join(timeout=240)
    model = outcome["model"]
    assert model.metrics["epoch"] == 3
    # Not from the start: the epoch that had ended was not paid for again, the one that was cut short was.
    assert model.metrics["resumed_after"] == 1
    attempts = seen(folder)
    processes = {rank: [key[2] for key in attempts if key[1] == rank and key[0] == 2] for rank in ("rank0", "rank1")}
    for (epoch, rank, _), batches in expected.items():
        # Rows, their order, their batches and their augmented pictures.
        of_epoch = {key[2]: found for key, found in attempts.items() if key[:2] == (epoch, rank)}
        last = of_epoch[processes[rank][0]] if epoch else next(iter(of_epoch.values()))
        assert last == batches, f"epoch {epoch} of {rank} differs after the restart"
        for cut_short in of_epoch.values():
            assert cut_short == batches[: len(cut_short)]
    drawn = [[], [], []]
    for (epoch, _, _), batches in expected.items():
        drawn[epoch] += [row for batch in batches for row in batch["rows"]]
    assert len(drawn[0]) == 1200 and sorted(drawn[0]) != sorted(drawn[1])
    rows, log_probabilities = model.predictions(version.task)
    labels = version.lesions["label"].to_numpy()[version.positions([0])]
    assert np.array_equal(rows, np.arange(len(labels)))
    assert model.metrics["auc"] > 0.95
    assert np.allclose(np.exp(log_probabilities).sum(axis=1), 1, atol=1e-4)


def test_two_workers_split_the_epoch_and_score_every_validation_row_once(ray_connected, version, tmp_path):
    model = fit(build_trainer(config(1, 128, workers=2), version, 0, str(tmp_path), "two"))
    assert model.metrics["train_rows"] == 64
    rows, _ = model.predictions(version.task)
    assert np.array_equal(rows, np.arange(len(version.positions([0]))))
    assert len(list(model.checkpoint.glob("predictions_*.parquet"))) == 2


def test_the_refit_never_sees_the_gate_split(ray_connected, version, tmp_path):
    trainer = build_trainer(config(1, 64), version, None, str(tmp_path), "refit")
    assert "validation" not in trainer.datasets
    source_rows = trainer.datasets["train"]().take_all()
    training = set(version.training_positions)
    ids = {int(row["row"]) for row in source_rows}
    assert ids <= set(range(len(training)))
    assert not training & set(version.gate_positions)
