"""Tasks that leave the service are noted first, and none of an erased patient leaves."""

from __future__ import annotations

import threading

import pytest

from monitoring.prediction_log import PredictionLog, PredictionRecord
from store import audit_chain
from store.erasure import PatientErasure
from store.image_files import prepare_image
from store.label_tasks import HANDED_OUT, record_handout, select_label_tasks
from store.prediction_records import PredictionFilter, known_predictions
from tests.bundle_factory import lesion_image

PATIENTS = ("a" * 64, "b" * 64)


@pytest.fixture
def log(any_store_url, tmp_path):
    made = PredictionLog(any_store_url, str(tmp_path / "images"), str(tmp_path / "spool"))
    for number in range(4):
        picture = prepare_image(lesion_image(number))
        fields = {"model_version": "7", "context": "none", "risk": 0.1, "threshold": 0.5, "band": "low"}
        fields |= {"patient_hmac": PATIENTS[number % 2], "image_hash": picture.hash, "received_at": 1_000 + number}
        made.write([PredictionRecord(id=f"p{number}", **fields)], {picture.hash: picture.data})
    yield made
    made.store.close()


def erase(log, patient=PATIENTS[0]):
    PatientErasure(log.store, log.image_files, log.spool).erase(patient, "admin")


def noted(store):
    return [entry for entry in store.audit_entries() if entry["action"] == HANDED_OUT]


def test_tasks_are_noted_once_all_of_them_are_still_there(log):
    chosen, _ = select_label_tasks(log.store, PredictionFilter(labelled=False), 10, 0.5, 0)
    ids = [item.row["id"] for item in chosen]
    assert ids == ["p0", "p1", "p2", "p3"] and known_predictions(log.store, ids) == set(ids)
    erase(log)
    assert record_handout(log.store, "tasks-1", ids, "Ada", {"num_tasks": 4}) == {"p0", "p2"}
    assert noted(log.store) == [] and known_predictions(log.store, ids) == {"p1", "p3"}
    assert record_handout(log.store, "tasks-2", ["p1", "p3"], "Ada", {"num_tasks": 2}) == frozenset()
    (entry,) = noted(log.store)
    assert (entry["actor"], entry["subject"], entry["detail"]) == ("Ada", "label_tasks/tasks-2", {"num_tasks": 2})
    assert audit_chain.verify(log.store.audit_entries()) == 3


def test_a_picture_past_its_retention_is_as_good_as_erased(log):
    with log.store.writing() as connection:
        connection.exec_driver_sql(
            "DELETE FROM images WHERE hash = (SELECT image_hash FROM predictions WHERE id = 'p3')"
        )
    assert record_handout(log.store, "tasks", ["p1", "p3"], "Ada", {}) == {"p3"} and noted(log.store) == []


def test_an_erasure_waits_for_tasks_that_are_being_noted(log, monkeypatch):
    """It comes after the entry, so that whoever reads the trail knows that the tasks hold the patient."""
    append, erasing = log.store._append_audit, threading.Thread(target=erase, args=(log,))
    gone_early = []

    def slowly(*arguments):
        monkeypatch.undo()
        erasing.start()
        erasing.join(0.5)
        gone_early.append(not erasing.is_alive())
        return append(*arguments)

    monkeypatch.setattr(log.store, "_append_audit", slowly)
    assert record_handout(log.store, "tasks", ["p0"], "Ada", {}) == frozenset()
    erasing.join(30)
    assert gone_early == [False] and known_predictions(log.store, ["p0"]) == set()
    actions = [entry["action"] for entry in log.store.audit_entries()]
    assert actions.index(HANDED_OUT) < actions.index("erase_patient")
