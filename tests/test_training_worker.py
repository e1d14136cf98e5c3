"""The train loop of one worker, without a cluster: the same seed gives the same scores, cut short or not."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import ray.train
import torch

from modeling.schema import TaskSpec
from training import worker
from training.config import TrainingConfig

ROWS, SIZE, EPOCHS = 48, 32, 3
TASK = TaskSpec(
    name="dark-spots",
    fold_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
)


class Killed(Exception):
    """Stands for the end of a worker process."""


class Shard:
    """Pictures as a Ray Data shard gives them: a function of the split and the announced epoch alone."""

    def __init__(self, name, cursor):
        self.name, self.cursor = name, cursor

    def iter_torch_batches(self, batch_size, device, prefetch_batches):
        epoch = int(open(self.cursor).read()) if self.name == "train" else -1
        rng = np.random.default_rng([7, epoch + 1])
        labels = rng.integers(0, 2, ROWS)
        images = np.clip(rng.normal(120 - 20 * labels[:, None, None, None], 40, (ROWS, SIZE, SIZE, 3)), 0, 255)
        for start in range(0, ROWS, batch_size):
            part = slice(start, start + batch_size)
            yield {
                "image": torch.from_numpy(images[part].astype(np.uint8)),
                "label": torch.from_numpy(labels[part]),
                "row": torch.arange(ROWS)[part],
                "epoch": torch.full((len(labels[part]),), epoch),
            }


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the loop and gives the last checkpoint's state and predictions; `killed_in`: the epoch that a first attempt
    is cut short in, after which a second one goes on from the checkpoint."""
    counter = iter(range(100))

    def run(seed=0, killed_in=None):
        folder = tmp_path / str(next(counter))
        folder.mkdir()
        cursor = str(folder / "epoch")
        reported = []

        def report(metrics, checkpoint):
            kept = folder / f"checkpoint-{len(reported)}"
            shutil.copytree(checkpoint.path, kept)
            reported.append(ray.train.Checkpoint.from_directory(kept))

        original = worker.train_epoch

        def train_epoch(model, batches, *rest):
            if killed_in is not None and len(reported) == killed_in and not (folder / "killed").exists():
                (folder / "killed").touch()
                next(iter(batches))
                torch.rand(1000)  # as if it had trained on for a while
                raise Killed
            return original(model, batches, *rest)

        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        with monkeypatch.context() as patch:
            patch.setattr(worker, "train_epoch", train_epoch)
            patch.setattr(ray.train, "get_context", lambda: context)
            patch.setattr(ray.train, "get_dataset_shard", lambda name: Shard(name, cursor))
            patch.setattr(ray.train, "get_checkpoint", lambda: reported[-1] if reported else None)
            patch.setattr(ray.train, "report", report)
            patch.setattr(ray.train.torch, "prepare_model", lambda model: model)
            patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
            config = TrainingConfig.model_validate(
                {
                    # The smallest network of timm: what is tested is the loop, and any network draws its dropout masks.
                    "model": {"backbone": "test_efficientnet", "weights": "none", "input_size": SIZE, "dropout": 0.5},
                    "optimizer": {"epochs": EPOCHS, "batch_size": 16, "learning_rate": 0.002},
                    "augmentation": {"recipe": "none"},
                    "workers": {"torch_threads": 1},
                    "seed": seed,
                }
            )
            settings = {"config": config.model_dump(), "task": TASK.model_dump(), "epoch_rows": ROWS}
            settings |= {"cursor": cursor, "title": "test", "evaluate": "last", "teacher": None}
            if killed_in is not None:
                with pytest.raises(Killed):
                    worker.train_loop_per_worker(settings)
            worker.train_loop_per_worker(settings)
        last = reported[-1].path
        state = torch.load(f"{last}/{worker.CHECKPOINT_FILE}", weights_only=True)
        return state, pd.read_parquet(f"{last}/{worker.predictions_file(0)}")

    return run


def differences(first, second):
    """Largest difference of the averaged weights, and of the scores."""
    one, other = first[0]["average"], second[0]["average"]
    weights = max(float((one[name] - value).abs().max()) for name, value in other.items())
    return weights, float(np.abs(first[1]["lp_malignant"] - second[1]["lp_malignant"]).max())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_scores_and_another_seed_others(train):
    first = train()
    assert differences(first, train()) == (0.0, 0.0)
    assert min(differences(first, train(seed=1))) > 1e-3


@pytest.mark.slow
def test_a_run_that_was_cut_short_gives_the_scores_of_an_unbroken_one(train):
    weights, scores = differences(train(), train(killed_in=1))
    assert weights < 1e-6 and scores < 1e-6
