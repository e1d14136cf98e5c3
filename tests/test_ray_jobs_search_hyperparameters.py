"""What cannot work is refused in one line, before any trial is paid for."""

from pathlib import Path

import pandas as pd
import pytest

from data_pipelines.image_dataset import DatasetVersion
from ray_jobs.job import parse_config
from ray_jobs.search_hyperparameters import SearchHyperparametersConfig, check_networks, make_plan
from tests.house import REPO_ROOT
from tests.tiny_bundle import tiny_task

CONFIG = REPO_ROOT / "configs" / "search_hyperparameters.yaml"
VERSION = DatasetVersion(Path("/data/isic2024"), tiny_task(), "d" * 64, "images.hdf5", pd.DataFrame(), 5)


def config(*flags):
    return parse_config(SearchHyperparametersConfig, list(flags), CONFIG)


def test_the_default_search_covers_the_whole_space():
    plan = make_plan(config("--search-name", "night", "--resume", "true"), VERSION)
    fields = {"model", "model.input_size", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.ema_decay"}
    fields |= {"optimizer.label_smoothing", "sampling.negatives_per_positive", "augmentation.strength"}
    assert set(plan.space) == fields
    assert {value["backbone"] for value in plan.space["model"].values} > {"tf_efficientnet_lite0"}
    assert (plan.num_folds, plan.grace_folds, plan.reduction_factor) == (5, 1, 2.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resume", "true"), "resume = true: expected search_name"),
        (("--num-folds", "9"), "num_folds = 9: the data set has 5 folds"),
        (("--num-folds", "2", "--pruning.grace-folds", "3"), "pruning.grace_folds = 3: a full trial has 2 folds"),
    ],
)
def test_a_search_that_cannot_be_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config(*flags), VERSION)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "mobilenetv3_small_100", "weights": "package"}, "no packaged weights for mobilenetv3_small_100"),
        ({"backbone": "no_such_network", "weights": "none"}, "a trial of backbone 'no_such_network', weights 'none'"),
    ],
)
def test_networks_that_a_trial_could_not_build_are_refused(model, message):
    given = config("--space.model.values", f"[{{backbone: {model['backbone']}, weights: {model['weights']}}}]")
    with pytest.raises(ValueError, match=message):
        check_networks(make_plan(given, VERSION), VERSION)
