"""An erasure reaches exports and data sets, wherever it is cut off, and touches no one else's rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sql

from data_pipelines import dataset_erasure
from data_pipelines.dataset_version import SplitSettings, prepare_version
from data_pipelines.hdf5_index import build_index
from data_pipelines.image_dataset import open_dataset
from modeling.schema import TaskSpec
from monitoring.prediction_log import patient_hmac
from ray_jobs import erase_patient, export_predictions
from ray_jobs.erase_patient import ErasePatientConfig, run
from ray_jobs.export_predictions import ExportPredictionsConfig
from store.database import open_store
from store.erasure import PatientErasure
from store.erasure_reach import pending_copies
from store.exports import Written, export_id, find_export, finish_erasure, remove_export, take_over_export
from store.image_files import ImageFiles
from store.spool import Spool
from store.tables import candidates, dataset_predictions, dataset_versions
from tests.log_rows import prediction_row

pytestmark = pytest.mark.slow

KEY = b"secret"
PATIENT, OTHER = "IP_0000003", "IP_0000004"
THEIRS, OTHERS = patient_hmac(PATIENT, KEY), patient_hmac(OTHER, KEY)
START_US = 1_714_521_600_000_000
TASK = TaskSpec(
    name="tiny",
    fold_group="patient_id",
    context_group="patient_id",
    label_column="target",
    label_values=["0", "1"],
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"age": {"minimum": 0, "maximum": 120}},
)


class Place:
    """A store with records of two patients, their export, and a data set of 24 patients that has a quarantined row."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.datasets = folder, url, folder / "datasets"
        self.store = open_store(url)
        (folder / "key").write_bytes(KEY)
        self.insert("theirs", patient_hmac=THEIRS)
        self.insert("others", patient_hmac=OTHERS)
        self.images = folder / "images.hdf5"
        self.export = Path(self.write_export()["path"])
        self.version = Path(self.prepare())

    def insert(self, name, **values):
        self.store.insert_predictions([prediction_row(name, **{"received_at": START_US + 5} | values)])

    def write_export(self, out="exports"):
        config = ExportPredictionsConfig(
            start="2024-05-01", end="2024-05-01", out=str(self.folder / out), store_url=self.url
        )
        return export_predictions.run(config)

    def prepare(self):
        ids = [f"ISIC_{number:07d}" for number in range(72)]
        table = pd.DataFrame({"isic_id": ids, "patient_id": [f"IP_{number // 3:07d}" for number in range(72)]})
        table["target"] = [int(number % 3 == 0) for number in range(72)]
        table["age"] = [20.0 + number for number in range(71)] + [999.0]
        table.to_csv(self.folder / "metadata.csv", index=False)
        with h5py.File(self.images, "w") as file:
            for name in ids:
                file.create_dataset(name, data=np.bytes_(b"picture of " + name.encode()))
        arguments = str(self.images), str(self.folder / "metadata.csv"), str(self.datasets / "tiny")
        made = prepare_version(*arguments, TASK, SplitSettings(3, 0.2, 0), False, lambda line: None)
        return made["dataset"]

    def job(self, **values):
        values = {"datasets": [str(self.datasets)], "patient_key_file": str(self.folder / "key")} | values
        places = {"images_url": str(self.folder / "pictures"), "spool_dir": str(self.folder / "spool")}
        return run(ErasePatientConfig(store_url=self.url, **places, **values))

    def erase(self, patient=THEIRS):
        files, spool = ImageFiles(str(self.folder / "pictures")), Spool(self.folder / "spool")
        return PatientErasure(self.store, files, spool).erase(patient, "admin")

    def rows(self, table):
        with self.store.reading() as connection:
            return [dict(row) for row in connection.execute(sql.select(table)).mappings()]

    def write(self, statement):
        with self.store.writing() as connection:
            connection.execute(statement)

    def exported(self):
        return set(pq.read_table(self.export)["id"].to_pylist())

    def state(self):
        """All that an erasure changes, but for times."""
        versions = {row["digest"]: row for row in self.rows(dataset_versions)}
        return {
            "files": sorted(
                (str(path.relative_to(self.folder)), path.read_bytes())
                for root in (self.datasets, self.export.parent)
                for path in root.rglob("*")
                if path.is_file()
            ),
            "versions": {key: (row["state"], row["path"], row["detail"]) for key, row in versions.items()},
            "lineage": sorted(row["prediction_id"] for row in self.rows(dataset_predictions)),
            "pending": pending_copies(self.store),
            "export": {
                name: find_export(self.store, export_id(str(self.export)))[name] for name in ("state", "detail")
            },
            "audit": [(entry["action"], entry["subject"]) for entry in self.store.audit_entries()],
        }


@pytest.fixture
def place(tmp_path, any_store_url):
    made = Place(tmp_path, any_store_url)
    yield made
    made.store.close()


def register(place, **values):
    """Registers the version as a job that has a store does."""
    facts = json.loads((place.version / "dataset.json").read_text())
    row = {"digest": facts["digest"], "path": str(place.version), "parent_digest": None, "created_at": 1}
    row |= {"num_rows": facts["num_rows"], "state": "ready", "deleted_at": None, "detail": {}} | values
    place.write(sql.insert(dataset_versions).values(row))
    return row["digest"]


def holding(place, text: str) -> list[str]:
    roots = (place.datasets, place.export.parent)
    return [
        path.name for root in roots for path in root.rglob("*") if path.is_file() and text in path.read_text("latin1")
    ]


def test_the_patient_leaves_exports_and_data_sets_and_others_stay(place):
    old, table = place.version, open_dataset(place.version).lesions
    result = place.job(patient_id=PATIENT, actor="admin")
    assert result["counts"]["predictions"] == 1 and result["pending"] == {"exports": 0, "datasets": 0}
    assert place.exported() == {"others"} and result["exports"] == [{"path": str(place.export), "removed_rows": 1}]
    version = open_dataset(place.datasets / "tiny")
    assert version.path != old and not old.exists() and result["datasets"][0]["new_version"] == str(version.path)
    kept = table[table["group"] != PATIENT].reset_index(drop=True)
    pd.testing.assert_frame_equal(version.lesions, kept)
    facts = json.loads((version.path / "dataset.json").read_text())
    assert facts["num_rows"] == len(kept) == 68 and facts["digest"] == version.digest
    assert sum(facts["class_counts"].values()) == 68 and facts["num_quarantined"] == 1
    report = json.loads((version.path / "report.json").read_text())
    assert report["rows"] == 68 and report["quarantined"] == {"out_of_range": 1}
    assert holding(place, PATIENT) == holding(place, THEIRS) == holding(place, "ISIC_0000009") == []
    assert result["operator_files"] == [str(place.images)]


def test_a_call_by_http_leaves_it_to_the_job_and_the_job_runs_without_a_patient(place):
    digest = register(place)
    erasure = place.erase()
    assert erasure.pending == {"exports": 1, "datasets": 1} and place.exported() == {"theirs", "others"}
    place.job()
    assert place.exported() == {"others"} and pending_copies(place.store) == {"exports": 0, "datasets": 0}
    again = place.erase()
    assert again.pending == {"exports": 0, "datasets": 0} and set(again.counts.values()) == {0}
    before = place.state()
    assert place.job()["datasets"] == [] and place.state() == before
    (gone,) = [row for row in place.rows(dataset_versions) if row["digest"] == digest]
    assert gone["state"] == "deleted" and gone["deleted_at"] is not None


def test_nothing_is_written_where_the_patient_is_not(place):
    content, version = place.export.read_bytes(), place.version
    result = place.job(patient_id="IP_none", actor="admin")
    assert result["exports"][0]["removed_rows"] == result["datasets"][0]["removed_rows"] == 0
    assert place.export.read_bytes() == content and version.exists() and result["operator_files"] == []


STAGES = [
    (erase_patient, "take_over_export"),
    (erase_patient, "holds_patients"),
    (erase_patient, "finish_erasure"),
    (export_predictions.ReplacedFile, "move"),
    (dataset_erasure, "_copy_images"),
    (dataset_erasure, "split_report"),
    (dataset_erasure.os, "rename"),
    (erase_patient, "replace_dataset"),
    (erase_patient, "move_latest"),
    (erase_patient, "remove_version"),
    (dataset_erasure.shutil, "rmtree"),
    (erase_patient, "models_of_dataset"),
    (erase_patient, "delete_dataset"),
]


def with_own_pictures(place):
    """Gives the version an HDF5 file of its own, as production pictures have, and a record's lineage."""
    digest = register(place)
    own = place.version / "production.hdf5"
    shutil.copy(place.images, own)
    facts = json.loads((place.version / "dataset.json").read_text()) | {"images": str(own.resolve())}
    (place.version / "dataset.json").write_text(json.dumps(facts))
    named = {"prediction_id": "theirs", "label_id": 1, "patient_hmac": THEIRS}
    others = {"prediction_id": "others", "label_id": 2, "patient_hmac": OTHERS}
    for row in (named, others):
        place.write(sql.insert(dataset_predictions).values(dataset_digest=digest, **row))
    place.write(
        sql.insert(candidates).values(
            model_version="7", digest="d", created_at=1, gate_metrics={}, state="waiting", dataset_digest=digest
        )
    )
    return digest


@pytest.mark.parametrize("stage", range(len(STAGES)), ids=[name for _, name in STAGES])
def test_killed_at_any_stage_and_run_again_it_ends_the_same(stage, tmp_path, monkeypatch):
    """Against the state that a copy of the same place reaches uninterrupted."""
    ends = []
    for killed in (False, True):
        folder = tmp_path / "place"
        folder.mkdir()
        place = Place(folder, f"sqlite:///{folder}/store.db")
        try:
            with_own_pictures(place)
            place.erase()
            if killed:
                with monkeypatch.context() as patch:

                    def kill(*_args, **_values):
                        raise KeyboardInterrupt

                    patch.setattr(*STAGES[stage], kill)
                    with pytest.raises(KeyboardInterrupt):
                        place.job()
            place.job()
            ends.append(place.state())
        finally:
            place.store.close()
        shutil.rmtree(folder)
    assert ends[1] == ends[0]
    assert ends[0]["pending"] == {"exports": 0, "datasets": 0}


def test_pictures_of_the_version_s_own_are_written_anew_with_their_byte_ranges(place):
    digest = with_own_pictures(place)
    result = place.job(patient_hmac=THEIRS, actor="admin")
    assert result["models"] == ["7"] and result["operator_files"] == []
    version = open_dataset(place.datasets / "tiny")
    assert Path(version.images_path).parent == version.path
    content = Path(version.images_path).read_bytes()
    assert b"ISIC_0000009" not in content and len(build_index(version.images_path).ids) == 68
    for row in version.lesions.itertuples():
        assert content[row.offset : row.offset + row.size] == b"picture of " + row.id.encode()
    lineage = {(row["dataset_digest"], row["prediction_id"]) for row in place.rows(dataset_predictions)}
    assert lineage == {(digest, "others"), (version.digest, "others")}
    (entry,) = [entry for entry in place.store.audit_entries() if entry["action"] == "erase_from_dataset"]
    assert entry["detail"] == {"replaced_by": version.digest, "patients": 1, "models": ["7"]}
    assert entry["subject"] == f"dataset/{digest}"


def test_a_later_visit_stays_in_a_data_set(place):
    digest = with_own_pictures(place)
    table = pd.read_parquet(place.version / "lesions.parquet")
    table.loc[table["id"] == "ISIC_0000012", ["id", "group", "context"]] = "again", THEIRS, THEIRS
    table.to_parquet(place.version / "lesions.parquet", index=False)
    place.erase()
    place.store.insert_predictions([prediction_row("again", received_at=2**55, patient_hmac=THEIRS)])
    later = {"prediction_id": "again", "label_id": 3, "patient_hmac": THEIRS}
    place.write(sql.insert(dataset_predictions).values(dataset_digest=digest, **later))
    place.job()
    new = {row["prediction_id"] for row in place.rows(dataset_predictions) if row["dataset_digest"] != digest}
    assert new == {"again", "others"}
    left = open_dataset(place.datasets / "tiny").lesions
    assert set(left.loc[left["group"] == THEIRS, "id"]) == {"again"} and len(left) == 68


def test_a_version_that_was_made_during_the_erasure_is_looked_through(place):
    parent = register(place, created_at=5)
    place.erase()
    place.job()
    place.prepare()
    # Made from the parent before it was cleaned, registered after.
    register(place, parent_digest=parent, created_at=2**55, digest="c" * 64)
    place.job(datasets=[])
    rows = {row["digest"]: row["state"] for row in place.rows(dataset_versions)}
    assert rows["c" * 64] == "deleted" and holding(place, PATIENT) == []


def test_a_version_that_is_being_built_is_given_up(place):
    digest = register(place, state="building")
    place.erase()
    result = place.job(datasets=[])
    assert not place.version.exists() and result["datasets"][0]["new_version"] is None
    assert [row["state"] for row in place.rows(dataset_versions) if row["digest"] == digest] == ["deleted"]


def test_versions_of_before_the_erasure_are_found_without_the_store(place):
    place.erase()
    os.utime(place.version / "dataset.json", (1, 1))
    place.job()
    assert holding(place, PATIENT) == []
    # Made again from the operator's files, it is of after the erasure: only an erasure that is asked for takes it.
    place.prepare()
    os.utime(place.datasets / "tiny" / (place.datasets / "tiny" / "LATEST").read_text().strip() / "dataset.json")
    assert place.job()["datasets"] == []
    place.job(patient_id=PATIENT, actor="admin")
    assert holding(place, PATIENT) == []


def test_what_cannot_be_reached_stays_pending_and_the_job_fails(place):
    place.erase()
    aside = place.folder / "unmounted"
    place.export.parent.rename(aside)
    for _ in range(2):
        with pytest.raises(ValueError, match="not finished: export .* its folder is not there"):
            place.job()
    assert pending_copies(place.store)["exports"] == 1
    aside.rename(place.export.parent)
    place.job()
    assert place.exported() == {"others"} and pending_copies(place.store)["exports"] == 0
    place.export.unlink()
    place.insert("again", patient_hmac=THEIRS, received_at=2**55)
    place.erase()
    assert place.job()["exports"] == [{"path": str(place.export), "removed_rows": None}]
    assert find_export(place.store, export_id(str(place.export)))["state"] == "deleted"


def test_an_export_that_was_cut_off_is_cleaned_too(place, monkeypatch):
    def killed(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_predictions, "publish_export", killed)
        patch.setattr(export_predictions.ReplacedFile, "discard", lambda self, token: None)
        with pytest.raises(KeyboardInterrupt):
            place.write_export()
    assert len(list(place.export.parent.iterdir())) == 2
    place.erase()
    place.job()
    assert [path.name for path in place.export.parent.iterdir()] == [place.export.name]
    assert place.exported() == {"others"}


def test_the_last_row_of_a_version_takes_it_along(place):
    table = pd.read_parquet(place.version / "lesions.parquet")
    table[table["group"] == PATIENT].to_parquet(place.version / "lesions.parquet", index=False)
    result = place.job(patient_id=PATIENT, actor="admin")
    assert result["datasets"][0]["new_version"] is None and not place.version.exists()
    assert not (place.datasets / "tiny" / "LATEST").exists()


def test_mistakes_are_one_line(place):
    with pytest.raises(ValueError, match="actor is missing"):
        place.job(patient_id=PATIENT)
    with pytest.raises(ValueError, match="both given"):
        place.job(patient_id=PATIENT, patient_hmac=THEIRS, actor="x")
    with pytest.raises(ValueError, match="patient_key_file .*No such file"):
        place.job(patient_key_file=str(place.folder / "nokey"))
    (place.folder / "key").write_bytes(b"")
    with pytest.raises(ValueError, match="patient_key_file .* is empty"):
        place.job()


def test_predictions_are_committed_while_files_of_exports_move(tmp_path, postgres_url):
    """On a bucket a move is a copy, which takes seconds. On SQLite there is one writer at a time whatever we do."""
    place = Place(tmp_path, postgres_url)
    row_id, moved = export_id(str(place.export)), []
    other = open_store(postgres_url)

    def move(name):
        row = prediction_row(name, received_at=START_US + 6, patient_hmac=OTHERS)
        moved.append(other.insert_predictions([row]).num_new)

    place.erase()
    claim, patients = take_over_export(place.store, row_id)
    finish_erasure(place.store, claim, patients, "admin", 1, Written(1, "0" * 64), lambda: move("while-replaced"))
    remove_export(place.store, row_id, lambda: move("while-removed"))
    assert moved == [1, 1] and find_export(place.store, row_id)["state"] == "deleted"
    other.close()
    place.store.close()
