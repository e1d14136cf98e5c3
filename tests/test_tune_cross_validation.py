"""Searches by Ray Tune itself, with a stand-in for the training of one fold: a killed driver, a resumed search."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from ray.train import Checkpoint

from modeling.metrics import partial_auc_above_tpr
from modeling.registry import Registry
from tests.dark_spots import prepare_dark_spots
from tests.house import REPO_ROOT
from tests.tiny_bundle import tiny_task
from training.config import TrainingConfig
from tune import cross_validation
from tune.cross_validation import train_fold

# The stand-in counts its calls in files. It holds the first training of trial 2's second fold, unless told to go on: a
# cluster takes seconds to end the trials of a killed driver, and a fold that ended in them would be kept.
DRIVER = """
import json, os, re, sys, time
from pathlib import Path

import ray

from ray_jobs.search_hyperparameters import SearchHyperparametersConfig, run

calls = Path(sys.argv[2])
QUALITY = {1: 0.14, 2: 0.16, 3: 0.10, 4: 0.155}


def train(config, version, fold, storage_path, name):
    number = int(re.match(r"trial_(\\d+)_", name)[1])
    attempts = len(list(calls.glob(f"{number}_{fold}_*")))
    (calls / f"{number}_{fold}_{attempts}").write_text(name)
    while (number, fold, attempts) == (2, 1, 0) and not (calls / "go").exists():
        time.sleep(0.05)
    # The first fold is an easy one.
    return {"pauc": QUALITY[number] + (0.02 if fold == 0 else 0.0), "auc": 0.9}


names = ("PYTHONPATH", "DERMRAY_HOME")
ray.init(runtime_env={"env_vars": {name: os.environ[name] for name in names}}, logging_level="warning")
print(json.dumps(run(SearchHyperparametersConfig.model_validate(json.loads(sys.argv[1])), train)))
"""


def test_a_fold_is_scored_over_the_rows_of_all_its_workers(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    # Every second row is the other worker's, which has all the malignant lesions that were missed.
    table = pd.DataFrame({"row": range(8), "label": [1, 1, 0, 1, 0, 0, 1, 0]})
    risks = np.array([0.9, 0.1, 0.2, 0.2, 0.3, 0.6, 0.8, 0.7])
    table["lp_benign"], table["lp_malignant"] = np.log1p(-risks), np.log(risks)
    table[::2].to_parquet(checkpoint / "predictions_0.parquet")
    table[1::2].to_parquet(checkpoint / "predictions_1.parquet")
    share = {"pauc": partial_auc_above_tpr(table["label"][::2], risks[::2]), "auc": 1.0}
    result = SimpleNamespace(checkpoint=Checkpoint.from_directory(str(checkpoint)), metrics=share)
    trainer = SimpleNamespace(fit=lambda: result)
    monkeypatch.setattr(cross_validation, "build_trainer", lambda *arguments: trainer)
    version = SimpleNamespace(task=tiny_task(), positions=lambda folds: np.arange(8))

    scores = train_fold(TrainingConfig(), version, 0, str(tmp_path), "trial_1_fold_0")
    # 16 pairs: of the other worker's malignant lesions one outranks no benign one, the other one only ties with one.
    assert scores["auc"] == pytest.approx(8.5 / 16)
    assert scores["pauc"] == pytest.approx(partial_auc_above_tpr(table["label"], risks)) != pytest.approx(share["pauc"])
    (checkpoint / "predictions_1.parquet").unlink()
    with pytest.raises(AssertionError, match="fold 0: 4 predictions for 8 rows"):
        train_fold(TrainingConfig(), version, 0, str(tmp_path), "trial_1_fold_0")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare_dark_spots(tmp_path_factory.mktemp("lesions"), 48, 2, num_folds=3)


class Driver:
    """A search in a process of its own."""

    def __init__(self, folder, cluster, dataset, name):
        self.folder, self.cluster, self.dataset, self.name = folder, cluster, dataset, name
        self.calls = folder / f"calls_{name}"
        self.calls.mkdir(exist_ok=True)
        self.script = folder / "driver.py"
        self.script.write_text(DRIVER)

    def config(self, **more):
        train_model = {
            "dataset": self.dataset,
            # One each: two searches that write to one SQLite file at a time would wait for each other.
            "tracking_uri": f"sqlite:///{self.folder}/{self.name}.db",
            "artifact_root": str(self.folder / "artifacts"),
        }
        return {
            "train_model": train_model,
            "space": {
                "optimizer.learning_rate": {"kind": "uniform", "low": 1e-4, "high": 1e-2, "log": True},
                "sampling.negatives_per_positive": {"kind": "choice", "values": [1, 3]},
            },
            "num_trials": 4,
            "seed": 5,
            "search_name": self.name,
            "searches": str(self.folder / "searches"),
            **more,
        }

    def start(self, **more):
        environment = {**os.environ, **self.cluster.client_environment()}
        environment |= {"PYTHONPATH": str(REPO_ROOT), "DERMRAY_HOME": str(self.folder)}
        with open(self.folder / f"{self.name}.log", "a") as log:
            return subprocess.Popen(
                [sys.executable, str(self.script), json.dumps(self.config(**more)), str(self.calls)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def result(self, process):
        out, _ = process.communicate()
        assert process.returncode == 0, (self.folder / f"{self.name}.log").read_text()[-6000:]
        return json.loads(out.strip().splitlines()[-1])

    def counts(self):
        """(trial, fold) -> times that its training began."""
        keys = [tuple(int(part) for part in file.name.split("_")[:2]) for file in self.calls.glob("*_*_*")]
        return {key: keys.count(key) for key in sorted(keys)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_search_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, ray_cluster, dataset):
    whole = Driver(tmp_path, ray_cluster, dataset, "whole")
    (whole.calls / "go").touch()
    beside = whole.start()
    deadline = time.monotonic() + 900
    # Ray Tune stages the states of two searches that start on one host in one second in one folder, and copies all of
    # it to both.
    while not list(whole.calls.glob("1_0_*")):
        assert beside.poll() is None, (tmp_path / "whole.log").read_text()[-6000:]
        assert time.monotonic() < deadline, "trial 1 of the search beside it never began"
        time.sleep(0.05)
    driver = Driver(tmp_path, ray_cluster, dataset, "night")
    process = driver.start()
    while not (driver.calls / "2_1_0").exists():
        assert process.poll() is None, (tmp_path / "night.log").read_text()[-6000:]
        assert time.monotonic() < deadline, "trial 2 never began its second fold"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Visible while it ran.
    log = (tmp_path / "night.log").read_text()
    assert "trial 2 of 4, fold 1 of 3: pAUC 0.1800" in log and "best is trial 1: mean pAUC 0.1467 of 3 folds" in log

    resumed = driver.result(driver.start(resume=True))
    uninterrupted = whole.result(beside)

    # Every fold was trained once, but for the one that the kill cut off; trial 3 was pruned after its first.
    once = {
        (1, 0): 1,
        (1, 1): 1,
        (1, 2): 1,
        (2, 0): 1,
        (2, 1): 1,
        (2, 2): 1,
        (3, 0): 1,
        (4, 0): 1,
        (4, 1): 1,
        (4, 2): 1,
    }
    assert whole.counts() == once
    assert driver.counts() == {**once, (2, 1): 2}
    same = ("best", "best_trial", "mean_pauc", "trials", "pruned", "failed", "folds_trained")
    assert {name: resumed[name] for name in same} == {name: uninterrupted[name] for name in same}
    assert (resumed["best_trial"], resumed["trials"], resumed["pruned"]) == (2, 4, 1)

    registry = Registry(f"sqlite:///{tmp_path}/night.db", "dermray", str(tmp_path / "artifacts"))
    experiment = registry.client.get_experiment_by_name("dermray").experiment_id
    parents = registry.client.search_runs([experiment], "tags.`mlflow.runName` = 'night'")
    assert [run.info.status for run in parents] == ["FINISHED"]
    children = {run.info.run_name: run for run in registry.children(resumed["mlflow_run"])}
    assert sorted(children) == ["trial_1", "trial_2", "trial_3", "trial_4"]
    assert len(registry.children(resumed["mlflow_run"])) == 4
    assert children["trial_3"].data.tags["state"] == "pruned"
    history = registry.client.get_metric_history(children["trial_2"].info.run_id, "fold_pauc")
    assert [(point.step, round(point.value, 6)) for point in history] == [(0, 0.18), (1, 0.16), (2, 0.16)]
    artifacts = {item.path for item in registry.client.list_artifacts(resumed["mlflow_run"])}
    assert {"parallel_coordinates.png", "importance.png", "best_over_cost.png", "trials.csv"} <= artifacts
    # No checkpoint is left behind.
    assert {file.suffix for file in (tmp_path / "searches" / "night" / "folds").iterdir()} == {".json"}
