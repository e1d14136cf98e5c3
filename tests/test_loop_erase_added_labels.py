"""An erasure of patients whose labelled lesions a data set has learned of: what is left trains, reads and scores."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines.hdf5_datasource import DecodeRecipe, LesionImageDatasource
from data_pipelines.image_dataset import open_dataset
from data_pipelines.image_reader import ADDED_IMAGES, ImageReader
from monitoring.prediction_log import patient_hmac
from ray_jobs.erase_patient import ErasePatientConfig, run
from store.dataset_lineage import find_dataset_version, lineage_of_prediction
from store.erasure_reach import pending_copies
from tests.test_data_pipelines_label_additions import KEY, PATIENTS, World, noise


@pytest.fixture
def world(dermray_home):
    return World(dermray_home)


def job(world, **values):
    places = {"images_url": str(world.home / "images"), "spool_dir": str(world.home / "spool")}
    places |= {"datasets": [str(world.out)], "store_url": f"sqlite:///{world.home}/store.db"}
    return run(ErasePatientConfig(**places, **values))


def encoded(version) -> dict[str, bytes]:
    """Every picture of a version by the id of its row."""
    rows = version.rows(np.arange(len(version.lesions)))
    with ImageReader(version.images_path) as reader:
        return dict(zip(rows.ids.tolist(), reader.read_many(rows.ids, rows.offset, rows.size), strict=True))


def decoded_rows(version) -> int:
    """How many pictures a training epoch's read tasks decode; a broken one is an error there."""
    source = LesionImageDatasource(version.images_path, version.rows(version.training_positions), DecodeRecipe(16))
    return sum(len(block["row"]) for task in source.get_read_tasks(1) for block in task())


def test_the_rewritten_version_reads_every_picture_that_is_left(world):
    kept = {name: world.labelled(name, seed, patient) for name, seed, patient in [("a", 901, "Jane"), ("c", 903, None)]}
    # Jane is erased; Joe's pictures lie before and behind hers in the file; IP_001 is a patient of the base as well.
    kept |= {"b": world.labelled("b", 902, "Joe", "benign"), "d": world.labelled("d", 904, "Joe")}
    kept |= {"e": world.labelled("e", 905, "IP_001")}
    made = world.prepare()
    before = open_dataset(made["dataset"])
    wanted = encoded(before)
    result = job(world, patient_id="Jane", actor="dpo")
    after = open_dataset(world.out)
    assert result["datasets"][0]["new_version"] == str(after.path) and not before.path.exists()
    assert result["operator_files"] == [], "the base has no picture of hers"
    assert set(after.lesions["id"]) == set(before.lesions["id"]) - {"a"}
    assert encoded(after) == {name: data for name, data in wanted.items() if name != "a"}
    assert encoded(after)["d"] == kept["d"].data
    folds = before.lesions.set_index("id")["fold"].drop("a")
    pd.testing.assert_series_equal(after.lesions.set_index("id")["fold"], folds)
    assert decoded_rows(after) == len(after.training_positions) > 0
    whole = b"".join(path.read_bytes() for path in after.path.iterdir())
    assert noise(901)[-300:] not in whole and noise(904)[-300:] in whole
    assert patient_hmac("Jane", KEY).encode() not in whole
    assert find_dataset_version(world.log.store, made["digest"])["state"] == "deleted"
    uses = {use.dataset_digest: use.state for use in lineage_of_prediction(world.log.store, "d")}
    assert uses == {made["digest"]: "deleted", after.digest: "ready"}
    assert pending_copies(world.log.store) == {"exports": 0, "datasets": 0}


def test_a_patient_of_base_and_log_leaves_both(world):
    world.labelled("e", 905, "IP_001")
    world.labelled("d", 904, "Joe")
    world.prepare()
    result = job(world, patient_id="IP_001", actor="dpo")
    after = open_dataset(world.out)
    assert {"ISIC_00002", "ISIC_00003", "e"}.isdisjoint(after.lesions["id"]) and "d" in set(after.lesions["id"])
    assert len(after.lesions) == 2 * PATIENTS - 2 + 1 and result["operator_files"] == [str(world.images)]
    assert decoded_rows(after) == len(after.training_positions)


def test_a_version_that_loses_all_that_was_added_still_trains_and_can_grow_again(world):
    world.labelled("a", 901, "Jane")
    world.prepare()
    job(world, patient_id="Jane", actor="dpo")
    after = open_dataset(world.out)
    assert len(after.lesions) == 2 * PATIENTS and decoded_rows(after) == len(after.training_positions)
    with h5py.File(after.path / ADDED_IMAGES) as file:
        assert len(file) == 0
    world.labelled("b", 902, "Joe")
    again = world.prepare()
    grown = open_dataset(again["dataset"])
    assert set(grown.lesions["id"]) - set(after.lesions["id"]) == {"b"}
    assert encoded(grown)["b"] == noise(902)
    second = job(world, patient_id="Joe", actor="dpo")
    assert second["pending"] == {"exports": 0, "datasets": 0}
    assert "b" not in set(open_dataset(world.out).lesions["id"])


def test_what_the_version_says_of_its_additions_is_true_after_an_erasure(world):
    world.labelled("a", 901, "Jane")
    world.labelled("b", 902, "Joe", "benign")
    world.labelled("c", 903, None)
    world.prepare()
    job(world, patient_id="Jane", actor="dpo")
    folder = open_dataset(world.out).path
    facts, report = (json.loads((folder / f"{name}.json").read_text()) for name in ("dataset", "report"))
    assert facts["added"]["rows"] == 2 and facts["added"]["class_counts"] == {"benign": 1, "malignant": 1}
    assert facts["added"]["class_shares"] == {"benign": 0.5, "malignant": 0.5} and report["added"] == facts["added"]
    assert "patients" not in facts["added"] and Path(facts["images"]) == world.images
