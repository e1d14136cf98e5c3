"""What cannot work is refused in one line, before any trial is paid for."""

import dataclasses
import os
from pathlib import Path

import pandas as pd
import pytest

from data_pipelines.image_dataset import DatasetVersion
from ray_jobs import search_hyperparameters
from ray_jobs.job import parse_config
from ray_jobs.search_hyperparameters import SearchHyperparametersConfig, check_networks, make_plan
from tests.house import REPO_ROOT
from tests.tiny_bundle import tiny_task
from tune.json_files import read_json
from tune.search_ledger import SearchLedger

CONFIG = REPO_ROOT / "configs" / "search_hyperparameters.yaml"
LESIONS = pd.DataFrame({"id": list("abcde"), "fold": [0, 0, 1, 1, -1], "label": [0, 1, 0, 1, 0]})
VERSION = DatasetVersion(Path("/data/isic2024"), tiny_task(), "d" * 64, "images.hdf5", LESIONS, 5)


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


class Job:
    """The job with stand-ins for the data set, the cluster and MLflow; its search does what `searching` does."""

    def __init__(self, monkeypatch, folder, version=VERSION):
        self.folder, self.statuses = folder, []
        for name, stand_in in {
            "open_dataset": lambda location: version,
            "check_networks": lambda plan, version: None,
            "connect_ray": lambda: None,
            "cluster_room": lambda base, most: (1, []),
            "SearchTracking": lambda *settings: self,
            "run_search": lambda *arguments: self.searching(),
        }.items():
            monkeypatch.setattr(search_hyperparameters, name, stand_in)

    def start(self, name, params):
        return "4f1d"

    def sync(self, ledger):
        self.synced = ledger

    def finish(self, status):
        self.statuses.append(status)

    def searching(self):
        raise RuntimeError("the cluster is gone")

    def run(self, *flags):
        return search_hyperparameters.run(
            config("--search-name", "night", "--searches", str(self.folder / "searches"), *flags)
        )

    @property
    def lease(self):
        return read_json(f"{self.folder}/searches/night/driver.json")


def test_a_search_has_one_driver_until_it_ends_however_it_ends(monkeypatch, tmp_path):
    job = Job(monkeypatch, tmp_path)
    held = []

    def searching():
        held.append(job.lease["pid"])
        raise RuntimeError("the cluster is gone")

    job.searching = searching
    for flags in ((), ("--resume", "true")):
        with pytest.raises(RuntimeError, match="the cluster is gone"):
            job.run(*flags)
        assert job.lease is None
    assert held == [os.getpid()] * 2 and job.statuses == ["FAILED"] * 2


@pytest.mark.parametrize(
    ("field", "then", "now"),
    [
        ("tracking_uri", "postgresql://ada:s3cret@db.site/mlflow", "postgresql://ada:s3cret@other.site/mlflow"),
        ("artifact_root", "s3://bucket/artifacts", "s3://bucket/other"),
        ("model_name", "dermray", "other"),
    ],
)
def test_a_search_goes_on_where_it_was_logged(monkeypatch, tmp_path, field, then, now):
    job = Job(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match="the cluster is gone"):
        job.run(f"--train-model.{field}", then)
    with pytest.raises(ValueError, match=f"was started otherwise: {field} was ") as refused:
        job.run(f"--train-model.{field}", now, "--resume", "true")
    marker = (tmp_path / "searches" / "night" / "search.json").read_text()
    assert "s3cret" not in marker + str(refused.value)
    # A new password is no other address.
    with pytest.raises(RuntimeError, match="the cluster is gone"):
        job.run(f"--train-model.{field}", then.replace("s3cret", "n3w"), "--resume", "true")


def test_a_cluster_that_is_too_small_leaves_nothing_behind(monkeypatch, tmp_path):
    job = Job(monkeypatch, tmp_path)

    def too_small(base, most):
        raise ValueError("the cluster is too small for a trial")

    monkeypatch.setattr(search_hyperparameters, "cluster_room", too_small)
    with pytest.raises(ValueError, match="too small"):
        job.run()
    assert not (tmp_path / "searches").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images_path": None}, "has no pictures; the search trains image models"),
        ({"lesions": LESIONS[LESIONS["label"] == 0]}, "0 of its 2 training rows are malignant"),
    ],
)
def test_a_data_set_that_trains_nothing_is_refused_first(monkeypatch, tmp_path, fields, message):
    job = Job(monkeypatch, tmp_path, dataclasses.replace(VERSION, **fields))
    with pytest.raises(ValueError, match=message):
        job.run()
    assert not (tmp_path / "searches").exists()


def test_a_search_without_a_finished_trial_has_no_best_config(monkeypatch, tmp_path):
    job = Job(monkeypatch, tmp_path)
    ledger = SearchLedger(num_trials=2, num_folds=5)
    for number, error in ((1, "RuntimeError: out of memory"), (2, None)):
        ledger.start(str(number), number, {})
        ledger.report(str(number), 1, 0.15, 0.9, 60)
        ledger.end(str(number), error)
    job.searching = lambda: ledger
    expected = r"no trial trained all 5 folds.*1 pruned, 1 failed\); the first failure: RuntimeError: out of memory"
    with pytest.raises(RuntimeError, match=expected):
        job.run("--num-trials", "2")
    assert job.statuses == ["FAILED"]
    assert not (tmp_path / "searches" / "night" / "best_config.yaml").exists()
