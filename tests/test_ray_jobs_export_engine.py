"""From a registered bundle and its data set to an engine set that a service can start from, on any host."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.image_dataset import open_dataset
from modeling.bundle import load_bundle
from modeling.engine_candidates import unavailable_engines
from modeling.engine_set import find_engine_set
from modeling.engines import create_engine
from modeling.registry import Registry
from ray_jobs import export_engine
from ray_jobs.export_engine import ExportEngineConfig, gate_lesions
from tests.dark_spots import prepare_dark_spots
from tests.tiny_bundle import SIZE, tiny_bundle

INT8 = "openvino-1-int8"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare_dark_spots(tmp_path_factory.mktemp("dataset"), 240, 2, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, dataset):
    digest = open_dataset(dataset).digest
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", dataset_digest=digest)


@pytest.fixture
def paths(tmp_path):
    return {
        "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        "artifact_root": str(tmp_path / "artifacts"),
        "engine_sets": str(tmp_path / "engine_sets"),
    }


# The tiny network has one layer beside its head: all of it is quantised.
SETTINGS = {"rounds": 1, "int8": {"pictures": 64}}


def export(bundle, paths, **values):
    return export_engine.run(ExportEngineConfig(model=str(bundle.directory), **(SETTINGS | paths | values)))


def rows_of(result, **wanted):
    return [row for row in result["candidates"] if all(row[name] == value for name, value in wanted.items())]


def test_the_set_says_of_every_candidate_what_it_did_on_real_lesions(bundle, dataset, paths, capsys):
    result = export(bundle, paths, dataset=dataset)
    lesions = len(open_dataset(dataset).gate_positions)
    precisions = {row["precision"] for row in result["candidates"]}
    assert {"fp32", "int8"} <= precisions
    for row in rows_of(result, verdict="passed"):
        assert row["n"] == lesions and row["max_delta_p"] is not None and row["delta_pauc"] is not None
        assert row["images_per_second"] > 0 and row["ms_per_image"] > 0 and row["batch"] in (1, 8, 32)
    assert {row["batch"] for row in rows_of(result, chosen=True)} == {1, 8, 32}
    with open(Path(result["engine_set"]).with_suffix("") / "engines.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["candidate"] for row in table] == [row["candidate"] for row in result["candidates"]]
    said = capsys.readouterr().err
    assert f"comparing engines on {lesions} lesions" in said and "minmax of 64 training pictures" in said
    reasons = unavailable_engines().values()
    assert all(said.count(f"{reason}: not tried") == 1 for reason in reasons)


def test_int8_is_calibrated_on_rows_that_train_and_compared_on_rows_that_do_not(bundle, dataset, paths, monkeypatch):
    seen = []
    read = export_engine.read_pictures

    def recorded(version, positions, size):
        seen.append(set(positions.tolist()))
        return read(version, positions, size)

    monkeypatch.setattr(export_engine, "read_pictures", recorded)
    export(bundle, paths, dataset=dataset)
    version = open_dataset(dataset)
    assert seen[0] == set(version.gate_positions.tolist())
    assert seen[1] and all(positions <= set(version.training_positions.tolist()) for positions in seen[1:])


def test_a_chosen_network_is_found_by_hosts_that_see_mlflow_only(bundle, dataset, paths, monkeypatch):
    monkeypatch.setattr(
        "modeling.engine_selection.choose", lambda reports, buckets, objective: dict.fromkeys(buckets, INT8)
    )
    registry = Registry(paths["tracking_uri"], "dermray", paths["artifact_root"])
    registry.log_candidate(bundle.directory, "run", {}, {})
    limits = {"auc": 0.5, "pauc": 0.5, "mean_probability": 0.5}
    settings = SETTINGS | paths | {"model": "candidate", "dataset": dataset, "limits": limits}
    result = export_engine.run(ExportEngineConfig(**settings))
    shutil.rmtree(Path(result["engine_set"]).with_suffix(""))
    choice = find_engine_set(paths["engine_sets"], bundle.digest).choice
    engine = create_engine(load_bundle(bundle.directory), choice)
    assert engine.name == "openvino-f32-1-int8"
    assert engine.run(np.zeros((2, SIZE, SIZE, 3), np.uint8)).logits.shape == (2, 2)


def test_a_refused_network_is_not_kept_and_one_in_use_stays(bundle, dataset, paths, monkeypatch):
    loose = {"auc": 0.5, "pauc": 0.5, "mean_probability": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(
            "modeling.engine_selection.choose", lambda reports, buckets, objective: dict.fromkeys(buckets, INT8)
        )
        result = export(bundle, paths, dataset=dataset, limits=loose)
    folder = Path(result["engine_set"]).with_suffix("")
    in_use = {file.name for file in folder.glob("*.onnx")}
    assert len(in_use) == 1 and Path(result["engine_choice"]["network"]["uri"]).name in in_use
    # Calibrated on other pictures it is another network, which now is refused; a service may still start the first,
    # also when the set after the next one is made.
    strict = {"mean_probability": 1e-9}
    for seed in (5, 6):
        again = export(bundle, paths, dataset=dataset, limits=strict, seed=seed, better_int8=None)
        assert not rows_of(again, precision="int8", verdict="passed")
        assert {file.name for file in folder.glob("*.onnx")} == in_use
    (kept,) = folder.glob("*.onnx")
    os.utime(kept, (0, 0))
    export(bundle, paths, dataset=dataset, int8=None)
    assert not list(folder.glob("*.onnx"))


def test_a_network_that_cannot_be_made_costs_its_precision_only(bundle, dataset, paths, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("operator Abacus\nis not known")

    monkeypatch.setattr(export_engine, "write_int8", fail)
    result = export(bundle, paths, dataset=dataset)
    (row,) = rows_of(result, precision="int8")
    assert row["verdict"] == "refused" and row["reason"].endswith("operator Abacus is not known")
    assert rows_of(result, precision="fp32", verdict="passed", chosen=True)
    assert "int8: the network cannot be made" in capsys.readouterr().err


def test_without_a_data_set_float32_engines_only_are_tried_and_that_is_said_once(bundle, paths, capsys):
    result = export(bundle, paths)
    assert {row["precision"] for row in result["candidates"]} == {"fp32"}
    assert capsys.readouterr().err.count("no data set given") == 1


def test_another_data_set_than_the_models_is_refused(dataset, paths, tmp_path):
    """Its gate split may hold lesions that trained the model."""
    other = tiny_bundle(tmp_path / "other", dataset_digest="e" * 64)
    with pytest.raises(ValueError, match="is version .*; the bundle was trained on eeeeeeeeeeee"):
        export(other, paths, dataset=dataset)


def test_rare_cancers_are_all_compared_on(bundle, dataset):
    version = open_dataset(dataset)
    labels = version.lesions["label"].to_numpy()[version.gate_positions]
    lesions = gate_lesions(version, bundle, 2 * int(labels.sum()) + 3, seed=0)
    assert lesions.malignant.sum() == labels.sum() and len(lesions.images) == 2 * labels.sum() + 3
    assert lesions.images.shape[1:] == (SIZE, SIZE, 3) and len(lesions.groups) == len(lesions.images)
    few = gate_lesions(version, bundle, 10, seed=0)
    assert few.malignant.sum() == 5 and len(few.images) == 10


def test_where_benign_lesions_are_few_more_malignant_ones_are_compared_on(bundle, dataset):
    version = open_dataset(dataset)
    everything = len(version.gate_positions)
    assert len(gate_lesions(version, bundle, everything - 1, seed=0).images) == everything - 1
