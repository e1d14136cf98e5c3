"""From a prediction to the data sets that hold it and the models that learned from them; nothing erased is kept."""

from __future__ import annotations

import pytest
import sqlalchemy as sql

from store import audit_chain
from store.candidates import record_candidate
from store.database import open_store
from store.dataset_lineage import (
    Member,
    PredictionsGoneError,
    datasets_of_patient,
    find_dataset_version,
    finish_dataset_version,
    lineage_of_prediction,
    register_dataset_version,
)
from store.erasure import PatientErasure
from store.image_files import ImageFiles
from store.labels import NewLabel, add_label
from store.spool import Spool
from store.tables import dataset_predictions, dataset_versions
from tests.log_rows import prediction_row

PATIENT = "ab" * 32
DIGEST, OTHER = "1" * 64, "2" * 64


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    opened.insert_predictions([prediction_row("p", patient_hmac=PATIENT), prediction_row("q")])
    for name in ("p", "q"):
        add_label(opened, NewLabel(name, "nv", False, "a"), "clinic")
    yield opened
    opened.close()


def members():
    return [Member("p", 1, PATIENT), Member("q", 2, None)]


def register(store, digest=DIGEST):
    register_dataset_version(store, digest, f"/data/{digest[:12]}", "0" * 64, {"counts": {"added": 2}}, members())


def erase(store, tmp_path):
    PatientErasure(store, ImageFiles(str(tmp_path / "images")), Spool(str(tmp_path / "spool"))).erase(PATIENT, "dpo")


def test_a_prediction_leads_to_its_data_sets_and_their_models(store):
    for digest in (DIGEST, OTHER):
        register(store, digest)
        finish_dataset_version(store, digest, 12, "prepare_dataset")
    record_candidate(store, "4", "a" * 64, {}, dataset_digest=OTHER, requested_by="eve", retrain_id="r1")
    record_candidate(store, "5", "b" * 64, {}, dataset_digest=OTHER)
    record_candidate(store, "6", "c" * 64, {})
    assert lineage_of_prediction(store, "q") == [(DIGEST, "ready", []), (OTHER, "ready", ["4", "5"])]
    assert lineage_of_prediction(store, "unknown") == []
    assert [row["digest"] for row in datasets_of_patient(store, PATIENT)] == [DIGEST, OTHER]
    assert datasets_of_patient(store, "cd" * 32) == []


def test_a_version_is_found_from_its_registration_on_and_finished_once(store):
    register(store)
    assert [row["state"] for row in datasets_of_patient(store, PATIENT)] == ["building"]
    entries = len(store.audit_entries())
    for _ in range(2):
        register(store)
        finish_dataset_version(store, DIGEST, 12, "prepare_dataset")
    row = find_dataset_version(store, DIGEST)
    assert (row["state"], row["num_rows"], row["parent_digest"]) == ("ready", 12, "0" * 64)
    assert len(store.audit_entries()) == entries + 1 and audit_chain.verify(store.audit_entries())
    with store.reading() as connection:
        assert len(connection.execute(sql.select(dataset_predictions)).all()) == 2


def test_what_was_erased_before_is_not_registered_and_between_not_finished(store, tmp_path):
    register(store)
    erase(store, tmp_path)
    with pytest.raises(PredictionsGoneError):
        finish_dataset_version(store, DIGEST, 12, "prepare_dataset")
    with pytest.raises(PredictionsGoneError, match="1 of 2"):
        register(store, OTHER)
    assert find_dataset_version(store, OTHER) is None


def test_a_version_that_an_erasure_deleted_is_not_finished(store):
    register(store)
    with store.writing() as connection:
        connection.execute(sql.update(dataset_versions).values(state="deleted", deleted_at=5))
    assert datasets_of_patient(store, PATIENT) == []
    with pytest.raises(PredictionsGoneError, match="deleted"):
        finish_dataset_version(store, DIGEST, 12, "prepare_dataset")
    # The same content may be wanted once more.
    register(store)
    finish_dataset_version(store, DIGEST, 12, "prepare_dataset")
    row = find_dataset_version(store, DIGEST)
    assert (row["state"], row["deleted_at"]) == ("ready", None)
