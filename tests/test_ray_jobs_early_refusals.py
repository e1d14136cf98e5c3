"""A training that cannot be is refused before a cluster starts or a run folder appears."""

import pandas as pd
import pytest

from data_pipelines.image_dataset import DatasetVersion
from ray_jobs import search_hyperparameters, train_model
from ray_jobs.search_hyperparameters import SearchHyperparametersConfig
from ray_jobs.train_model import TrainModelConfig

SMALL = {"backbone": "mobilenetv3_small_050", "weights": "none", "input_size": 32}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"model": SMALL | {"backbone": "resnet_18"}}, "did you mean resnet18"),
        ({"model": SMALL, "distillation": {"teacher_run": "/runs/gone"}}, "/runs/gone is not the folder of a training"),
    ],
)
@pytest.mark.parametrize("job", ["train", "search"])
def test_a_users_mistake_is_found_before_anything_starts(
    monkeypatch, tmp_path, dermray_home, many_classes, job, training, message
):
    def no_cluster():
        raise AssertionError("a cluster was asked for")

    lesions = pd.DataFrame({"id": ["I0", "I1", "I2"], "fold": [0, 1, -1], "label": [0, 1, 0]})
    version = DatasetVersion(tmp_path, many_classes, "a" * 64, "images.hdf5", lesions, 2)
    for module in (train_model, search_hyperparameters):
        monkeypatch.setattr(module, "open_dataset", lambda location: version)
        monkeypatch.setattr(module, "connect_ray", no_cluster)
    base = TrainModelConfig(dataset="d", training=training)
    space = {"optimizer.learning_rate": {"kind": "uniform", "low": 1e-4, "high": 1e-3}}
    with pytest.raises(ValueError, match=message):
        if job == "train":
            train_model.run(base)
        else:
            search_hyperparameters.run(SearchHyperparametersConfig(train_model=base, space=space))
    assert not list(dermray_home.glob("*"))
