"""Labelled lesions of the log in a data set version: the right rows, no leak, lineage; nothing erased comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines import dataset_version, label_additions
from data_pipelines.added_pictures import PictureGoneError
from data_pipelines.image_dataset import open_dataset
from data_pipelines.image_reader import ADDED_IMAGES, ImageReader
from data_pipelines.labelled_lesions import AddLabels
from data_pipelines.lesion_pictures import read_pictures
from data_pipelines.synthetic_lesions import encode_jpeg
from modeling.schema import TaskSpec
from monitoring.prediction_log import PredictionLog, PredictionRecord, patient_hmac
from ray_jobs.prepare_dataset import PrepareDatasetConfig, run
from store.dataset_lineage import datasets_of_patient, find_dataset_version, lineage_of_prediction
from store.erasure import PatientErasure
from store.image_files import prepare_image
from store.labels import NewLabel, add_label
from store.tables import dataset_predictions, dataset_versions

KEY = b"a test's key"
PATIENTS = 24
TASK = TaskSpec(
    name="tiny",
    fold_group="patient_id",
    context_group="patient_id",
    label_column="target",
    label_values=["0", "1"],
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"age": {"minimum": 0, "maximum": 120}, "site": {"kind": "categorical"}},
    institution_column="attribution",
    subgroup_columns=["tile"],
)


def noise(seed):
    """A picture unlike any other: coarse random blocks."""
    rng = np.random.default_rng(seed)
    return encode_jpeg(np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8))


class World:
    """A base data set of two lesions for each of 24 patients, and a service's log."""

    def __init__(self, home: Path):
        self.home = home
        self.images, self.metadata, self.out = home / "base.hdf5", home / "base.csv", home / "datasets"
        ids = [f"ISIC_{number:05d}" for number in range(2 * PATIENTS)]
        columns = {"isic_id": ids, "patient_id": [f"IP_{number // 2:03d}" for number in range(len(ids))]}
        columns |= {"target": [number % 2 for number in range(len(ids))], "age": 50.0, "site": "arm"}
        pd.DataFrame({**columns, "attribution": "archive", "tile": "3D"}).to_csv(self.metadata, index=False)
        with h5py.File(self.images, "w") as file:
            for number, name in enumerate(ids):
                file.create_dataset(name, data=np.void(noise(number)))
        self.log = PredictionLog(f"sqlite:///{home}/store.db", str(home / "images"), str(home / "spool"))
        (home / "secrets").mkdir()
        (home / "secrets" / "patient_hmac.key").write_bytes(KEY)

    def predict(self, name, data, patient=None, at=1_000, **values):
        kept = prepare_image(data)
        hashed = None if patient is None else patient_hmac(patient, KEY)
        base = {"model_version": "7", "context": "none", "metadata": {"age": 61.0, "site": "leg"}, "risk": 0.9}
        base |= {"threshold": 0.5, "institution": "clinic", "image_hash": kept.hash, "patient_hmac": hashed}
        self.log.write([PredictionRecord(id=name, received_at=at, **(base | values))], {kept.hash: kept.data})
        return kept

    def label(self, name, label="malignant", readers=("a", "b"), **values):
        for reader in readers:
            add_label(self.log.store, NewLabel(name, label, label == "malignant", reader, **values), "clinic")

    def labelled(self, name, seed, patient=None, label="malignant", **values):
        kept = self.predict(name, noise(seed), patient, **values)
        self.label(name, label)
        return kept

    def prepare(self, images=True, **settings):
        config = PrepareDatasetConfig(
            images=str(self.images) if images else None,
            metadata=str(self.metadata),
            out=str(self.out),
            task=TASK,
            num_folds=3,
            gate_fraction=0.2,
            add_labels={"require": "agreed", **settings},
        )
        return run(config)

    def erase(self, patient):
        erasure = PatientErasure(self.log.store, self.log.image_files, self.log.spool)
        return erasure.erase(patient_hmac(patient, KEY), "dpo")

    def folders(self):
        return sorted(path.name for path in self.out.iterdir())


@pytest.fixture
def world(dermray_home):
    return World(dermray_home)


def rows_of(result):
    return open_dataset(result["dataset"]).lesions.set_index("id")


def reasons_of(result):
    table = pd.read_csv(f"{result['dataset']}/quarantine.csv", keep_default_na=False)
    return dict(zip(table["id"], table["reason"], strict=True))


def test_added_rows_are_the_labelled_lesions_and_their_pictures_are_read_like_the_bases(world):
    kept = {"m": world.labelled("m", 901, "Jane"), "b": world.labelled("b", 902, None, "benign")}
    png = np.random.default_rng(3).integers(0, 255, (40, 40, 3), np.uint8)
    kept["p"] = world.predict("p", cv2.imencode(".png", png)[1].tobytes(), "Jane")
    world.label("p")
    result = world.prepare()
    version = open_dataset(result["dataset"])
    rows = version.lesions.set_index("id")
    assert len(rows) == 2 * PATIENTS + 3 == result["num_rows"] and version.lesions["id"].is_monotonic_increasing
    jane = patient_hmac("Jane", KEY)
    assert rows.loc[["m", "b", "p"], "group"].tolist() == [jane, "b", jane]
    assert rows.loc[["m", "b", "p"], "context"].tolist() == [jane, "", jane]
    assert rows.loc[["m", "b"], "label"].tolist() == [1, 0]
    assert rows.loc["m", ["age", "site", "attribution"]].tolist() == [61.0, "leg", "clinic"]
    assert pd.isna(rows.loc["m", "tile"]) and rows.loc["ISIC_00000", "tile"] == "3D"
    assert rows["offset"].dtype == rows["size"].dtype == np.int64 and rows["perceptual_hash"].dtype == np.uint64
    every = np.arange(len(rows))
    wanted = version.rows(every)
    with ImageReader(version.images_path) as reader:
        read = dict(zip(wanted.ids, reader.read_many(wanted.ids, wanted.offset, wanted.size), strict=True))
    assert {name: read[name] for name in kept} == {name: stored.data for name, stored in kept.items()}
    assert read["ISIC_00007"] == noise(7)
    assert read_pictures(version, every, 16).shape == (len(rows), 16, 16, 3)
    assert rows.groupby("group")["fold"].nunique().max() == 1
    assert world.images.stat().st_size == json.loads((version.path / "dataset.json").read_text())["images_bytes"]
    assert result["added"]["class_counts"] == {"benign": 1, "malignant": 2}
    assert result["added"]["base_class_shares"]["malignant"] == 0.5


def test_a_patient_of_the_base_is_one_group_with_their_lesions_in_the_log(world):
    for number in range(8):
        world.labelled(f"m{number}", 900 + number, f"IP_{number:03d}")
    rows = rows_of(world.prepare())
    for number in range(8):
        added = rows.loc[f"m{number}"]
        assert added["group"] == added["context"] == f"IP_{number:03d}"
        assert added["fold"] == rows.loc[f"ISIC_{2 * number:05d}", "fold"]
    assert world.prepare()["added"]["patients_in_base"] == 8
    # The gate split is where it was without them.
    base = run(
        PrepareDatasetConfig(
            images=str(world.images), metadata=str(world.metadata), out=str(world.out), task=TASK, num_folds=3
        )
    )
    unseen = world.prepare(patient_key_file=None)
    assert unseen["added"]["patients_in_base"] is None
    assert unseen["digest"] not in (base["digest"], world.prepare()["digest"])


def test_what_is_in_the_base_already_or_twice_in_the_log_is_refused(world):
    decoded = cv2.imdecode(np.frombuffer(noise(5), np.uint8), cv2.IMREAD_COLOR)
    world.predict("same", noise(4), "Jane")
    world.predict("recompressed", cv2.imencode(".jpg", decoded, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes(), "Joe")
    world.predict("of the same patient", noise(6), "IP_003")
    world.predict("first", noise(900), "Ann", at=10)
    world.predict("again", noise(900), "Ann", at=20)
    world.predict("elsewhere", cv2.imencode(".png", cv2.imdecode(np.frombuffer(noise(900), np.uint8), 1))[1].tobytes())
    for name in ("same", "recompressed", "of the same patient", "first", "again", "elsewhere"):
        world.label(name)
    world.predict("says benign", noise(901), at=30)
    world.predict("says malignant", noise(901), at=40)
    world.label("says benign", "benign")
    world.label("says malignant")
    result = world.prepare()
    assert reasons_of(result) == {
        "same": "duplicate_of_base",
        "recompressed": "duplicate_of_base",
        "of the same patient": "duplicate_of_base",
        "again": "duplicate_picture",
        "elsewhere": "duplicate_picture",
        "says benign": "conflicting_labels",
        "says malignant": "conflicting_labels",
    }
    assert "first" in rows_of(result).index
    assert result["added"]["rows"] == 1


def test_only_labels_that_readers_agree_on_are_added_unless_one_is_enough(world):
    world.labelled("agreed", 900)
    world.predict("single", noise(901))
    world.label("single", readers=("a",))
    world.predict("split", noise(902))
    world.label("split", readers=("a",))
    world.label("split", "benign", readers=("b",))
    world.predict("settled", noise(903))
    world.label("settled", readers=("a",))
    world.label("settled", "benign", readers=("b",))
    world.label("settled", "benign", readers=("c",), adjudication=True)
    result = world.prepare()
    added = rows_of(result)
    assert {name for name in added.index if not name.startswith("ISIC")} == {"agreed", "settled"}
    assert added.loc["settled", "label"] == 0
    assert result["added"]["waiting"] == {"disagreed": 1, "one_reader": 1}
    assert set(rows_of(world.prepare(require="single")).index) - set(added.index) == {"single"}


def test_rows_that_do_not_fit_are_refused_with_a_reason(world):
    world.labelled("good", 900)
    world.labelled("old metadata", 901, metadata={"age": 400.0})
    world.labelled("gone", 902)
    world.log.image_files.remove(world.log.store.find_prediction("gone")["image_hash"])
    damaged = world.labelled("damaged", 903)
    Path(world.log.image_files.path(damaged.hash, ".jpg")).write_bytes(noise(1))
    world.labelled("ISIC_00003", 904)
    world.labelled("other model", 905, model_version="6")
    result = world.prepare(model_versions=["7"])
    assert reasons_of(result) == {
        "old metadata": "metadata_invalid",
        "gone": "image_missing",
        "damaged": "image_damaged",
        "ISIC_00003": "duplicate_id",
    }
    assert result["added"]["rows"] == 1 and result["added"]["waiting"] == {"other_model": 1}


def test_a_share_keeps_the_additions_in_bounds(world):
    for number in range(12):
        world.labelled(f"m{number:02d}", 900 + number)
    result = world.prepare(max_share=0.1)
    # 48 base rows: 5 of 53 are 9.4 %, 6 of 54 would be 11 %.
    assert result["added"]["rows"] == 5 and list(reasons_of(result).values()) == ["over_max_share"] * 7


def test_without_pictures_rows_are_added_all_the_same(world):
    world.labelled("m", 900, "Jane")
    version = open_dataset(world.prepare(images=False)["dataset"])
    assert version.images_path is None and "m" in set(version.lesions["id"]) and "added" not in version.lesions
    assert not (version.path / ADDED_IMAGES).exists()


def test_the_same_labels_give_the_same_version_and_a_new_one_another(world):
    world.labelled("m", 900, "Jane")
    first = world.prepare()
    again = world.prepare()
    assert again == first
    world.label("m", readers=("c",))
    later = world.prepare()
    assert later["digest"] != first["digest"] and later["parent_digest"] == first["parent_digest"]
    uses = lineage_of_prediction(world.log.store, "m")
    assert [(use.dataset_digest, use.state) for use in uses] == [(first["digest"], "ready"), (later["digest"], "ready")]
    row = find_dataset_version(world.log.store, first["digest"])
    assert Path(row["path"]) == Path(first["dataset"]) and row["num_rows"] == first["num_rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    ["take_pictures", "register_dataset_version", "write_pictures", "sync_files", "rename", "finish", "LATEST"],
)
def test_killed_at_any_stage_and_run_again_it_comes_to_the_same(world, stage, monkeypatch):
    world.labelled("m", 900, "Jane")
    expected = world.prepare()
    shutil.rmtree(world.out)
    with world.log.store.writing() as connection:
        connection.execute(dataset_versions.delete())
        connection.execute(dataset_predictions.delete())
    place = {
        "rename": (dataset_version.os, "rename"),
        "LATEST": (dataset_version, "replace_synced"),
        "finish": (label_additions, "finish_dataset_version"),
        "sync_files": (dataset_version, "sync_files"),
    }.get(stage, (label_additions, stage))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*place, killed)
        with pytest.raises(KeyboardInterrupt):
            world.prepare()
    assert "LATEST" not in world.folders()
    assert world.prepare() == expected
    assert world.folders() == sorted(["LATEST", expected["digest"][:12]])
    (use,) = lineage_of_prediction(world.log.store, "m")
    assert (use.dataset_digest, use.state) == (expected["digest"], "ready")
    assert len(datasets_of_patient(world.log.store, patient_hmac("Jane", KEY))) == 1


def test_an_erased_patient_does_not_come_back(world):
    world.labelled("m", 900, "Jane")
    world.labelled("n", 901, "Joe")
    world.erase("Jane")
    rows = rows_of(world.prepare())
    assert "m" not in rows.index and "n" in rows.index


@pytest.mark.parametrize("stage", ["register_dataset_version", "write_pictures", "finish_dataset_version"])
def test_a_patient_erased_meanwhile_is_in_no_version(world, stage, monkeypatch):
    world.labelled("m", 900, "Jane")
    world.labelled("n", 901, "Joe")
    real = getattr(label_additions, stage)
    calls = []

    def erased_first(*given, **named):
        if not calls:
            world.erase("Jane")
        calls.append(stage)
        return real(*given, **named)

    monkeypatch.setattr(label_additions, stage, erased_first)
    result = world.prepare()
    rows = rows_of(result)
    assert "m" not in rows.index and "n" in rows.index and len(calls) == 2
    assert noise(901)[-300:] in (Path(result["dataset"]) / ADDED_IMAGES).read_bytes()
    assert world.folders() == sorted(["LATEST", result["digest"][:12]])
    whole = b"".join(path.read_bytes() for path in Path(result["dataset"]).iterdir())
    assert patient_hmac("Jane", KEY).encode() not in whole and noise(900)[-300:] not in whole


def test_when_every_attempt_meets_an_erasure_the_job_says_so(world, monkeypatch):
    world.labelled("m", 900, "Jane")

    def gone(*_):
        raise PictureGoneError("gone")

    monkeypatch.setattr(label_additions, "write_pictures", gone)
    with pytest.raises(ValueError, match="erased during each of 3 attempts"):
        world.prepare()
    assert world.folders() == [name for name in world.folders() if name.startswith(".preparing-")]


def test_mistakes_are_one_line(world):
    world.predict("single", noise(900))
    with pytest.raises(ValueError, match="no labelled lesion can be added, of no labels"):
        world.prepare()
    world.label("single", readers=("a",))
    with pytest.raises(ValueError, match="'one_reader': 1.*require = agreed"):
        world.prepare()
    with pytest.raises(ValueError, match="patient_key_file /nowhere: No such file"):
        world.prepare(patient_key_file="/nowhere")
    with pytest.raises(ValueError, match="until is not after since"):
        AddLabels(since="2024-05-01", until="2024-04-01")
    with pytest.raises(ValueError, match="store.db"):
        world.prepare(store_url=f"sqlite:///{world.home}/nowhere/store.db")


def test_the_flag_alone_is_enough(world):
    world.labelled("m", 900)
    files = {"images": str(world.images), "metadata": str(world.metadata), "out": str(world.out), "task": TASK}
    result = run(PrepareDatasetConfig(**files, num_folds=3, add_labels=True))
    assert result["added"]["rows"] == 1
    assert PrepareDatasetConfig(**files, add_labels=False).add_labels is None
