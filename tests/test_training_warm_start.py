"""A warm start gives each network weights that never saw what it is to score, or says why it cannot."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from data_pipelines import image_dataset
from data_pipelines.image_dataset import DatasetVersion
from training import warm_start
from training.config import TrainingConfig
from training.image_models import check_training
from training.networks import CHECKPOINT_FILE, create_network
from training.run_folder import RUN_FILE
from training.warm_start import write_initial_weights

BACKBONE = "mobilenetv3_small_050"
MODEL = {"backbone": BACKBONE, "weights": "none", "input_size": 32}


@pytest.fixture(scope="module")
def task():
    from modeling.schema import TaskSpec

    return TaskSpec(
        name="t", fold_group="p", label_column="y", classes=["benign", "malignant"], malignant=["malignant"]
    )


def version(tmp_path, task, folds, digest="e" * 64):
    lesions = pd.DataFrame({"group": list("aabbccgg"), "fold": [fold for fold in folds for _ in range(2)]})
    return DatasetVersion(tmp_path / "data" / digest[:12], task, digest, "pictures.hdf5", lesions, 3)


@pytest.fixture
def config():
    return TrainingConfig.model_validate({"model": MODEL})


@pytest.fixture
def run(tmp_path, task, config):
    """A finished run of three folds; every network has weights of its own."""
    folder = tmp_path / "runs" / "champion"
    folder.mkdir(parents=True)
    identity = {"config": config.model_dump(), "dataset": "d" * 64}
    (folder / RUN_FILE).write_text(json.dumps(identity))
    for name in ("refit", "fold_0", "fold_1", "fold_2"):
        checkpoint = folder / name / "checkpoint"
        checkpoint.mkdir(parents=True)
        torch.save({"average": create_network(config, task).state_dict()}, checkpoint / CHECKPOINT_FILE)
        (folder / f"{name}.json").write_text(json.dumps({"checkpoint": str(checkpoint), "metrics": {}}))
    return folder


@pytest.fixture
def before(tmp_path, task, monkeypatch):
    """The run's data set, found beside the new one."""
    old = version(tmp_path, task, [0, 1, 2, -1], "d" * 64)

    def opened(path):
        assert path == old.path
        return old

    monkeypatch.setattr(warm_start, "open_dataset", opened)
    return old


def test_every_network_starts_from_the_one_that_did_not_see_its_fold(tmp_path, task, config, run, before):
    now = version(tmp_path, task, [0, 1, 2, -1])
    weights = write_initial_weights(run, now, config, tmp_path / "initial")
    warm = TrainingConfig.model_validate({"model": {**MODEL, "weights": weights}})
    check_training(warm, now, [None, 0, 1, 2])
    for name in ("refit", "fold_0", "fold_2"):
        trained = torch.load(run / name / "checkpoint" / CHECKPOINT_FILE, weights_only=True)["average"]
        network = create_network(warm.of_network(name), task).state_dict()
        backbone = [key for key in network if key.startswith("backbone.") and "num_batches" not in key]
        assert backbone and all(torch.equal(network[key], trained[key]) for key in backbone)
        assert any(not torch.equal(network[key], trained[key]) for key in network if not key.startswith("backbone."))
    # The config of the run names no network: all its networks share it, and a resumed run has the same.
    assert warm.of_network("refit") != warm and config.of_network("refit") == config


def test_new_patients_may_come_in_any_fold(tmp_path, task, config, run, before):
    now = version(tmp_path, task, [0, 1, 2, -1])
    lesions = pd.concat([now.lesions, pd.DataFrame({"group": ["n", "m"], "fold": [1, -1]})])
    assert write_initial_weights(run, replace(now, lesions=lesions), config, tmp_path / "initial")


@pytest.mark.parametrize("folds", [[1, 0, 2, -1], [0, 1, -1, -1], [0, 1, 1, -1]])
def test_a_network_never_scores_what_it_was_trained_on(tmp_path, task, config, run, before, folds):
    with pytest.raises(ValueError, match=r"\d of 4 groups are in another fold"):
        write_initial_weights(run, version(tmp_path, task, folds), config, tmp_path / "initial")
    assert not (tmp_path / "initial").exists()


def test_what_is_missing_is_named(tmp_path, task, config, run, before):
    now = version(tmp_path, task, [0, 1, 2, -1])
    out = tmp_path / "initial"
    other = TrainingConfig.model_validate({"model": {**MODEL, "backbone": "mobilenetv3_small_100"}})
    with pytest.raises(ValueError, match="trained mobilenetv3_small_050, not mobilenetv3_small_100"):
        write_initial_weights(run, now, other, out)
    with pytest.raises(ValueError, match="has 3 folds, this one 4"):
        write_initial_weights(run, replace(now, num_folds=4), config, out)
    (run / "fold_1.json").unlink()
    with pytest.raises(ValueError, match="no finished fold_1"):
        write_initial_weights(run, now, config, out)
    with pytest.raises(ValueError, match="not the folder of a training run"):
        write_initial_weights(tmp_path / "gone", now, config, out)


def test_a_data_set_that_is_gone_is_no_warm_start(tmp_path, task, config, run):
    assert warm_start.open_dataset is image_dataset.open_dataset
    with pytest.raises(ValueError, match="is not a prepared data set"):
        write_initial_weights(run, version(tmp_path, task, [0, 1, 2, -1]), config, tmp_path / "initial")
