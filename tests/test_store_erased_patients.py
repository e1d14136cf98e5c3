"""What was received before an erasure is not written after it, by whoever comes late; what came after it is."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest
import sqlalchemy as sql

from monitoring.prediction_log import PredictionLog, PredictionRecord
from store import audit_chain, erased_patients
from store.database import Store
from store.erased_patients import PatientErasedError
from store.erasure import PatientErasure
from store.labels import NewLabel, add_label
from store.submissions import find_submission, insert_submission
from store.tables import images, labels, now_us, submissions
from tests.log_rows import prediction_row

THEIRS, OTHER = "a" * 64, "b" * 64
OWN, SHARED = b"\xff\xd8 picture own", b"\xff\xd8 picture shared"
WAIT_S = 30


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Place:
    """The log of one machine, below its own folder, on a store that several share."""

    def __init__(self, url, folder, machine="one"):
        self.log = PredictionLog(url, str(folder / "images"), str(folder / machine / "spool"))
        self.store, self.images = self.log.store, self.log.image_files

    def erase(self, patient=THEIRS):
        return PatientErasure(self.store, self.images, self.log.spool).erase(patient, "admin")

    def record(self, name, patient, received_at, picture=None):
        return PredictionRecord(
            id=name,
            patient_hmac=patient,
            received_at=received_at,
            image_hash=None if picture is None else name_of(picture),
            model_version="1",
            context="none",
        )

    def ids(self):
        return {row["id"] for row in self.store.predictions_between(0, 2**62)}

    def has(self, data):
        try:
            return self.images.get(name_of(data), ".jpg") == data
        except FileNotFoundError:
            return False


@pytest.fixture
def place(any_store_url, tmp_path):
    made = Place(any_store_url, tmp_path)
    yield made
    made.store.close()


def test_a_record_that_was_received_before_the_erasure_is_left_out_and_a_new_visit_is_not(place):
    before = now_us()
    place.erase()
    after = now_us() + 1
    records = [
        place.record("late", THEIRS, before, OWN),
        place.record("late, shared picture", THEIRS, before, SHARED),
        place.record("other", OTHER, before, SHARED),
        place.record("nobody", None, before),
        place.record("new", THEIRS, after),
    ]
    inserted = place.log.write(records, {name_of(OWN): OWN, name_of(SHARED): SHARED})
    assert inserted == (3, frozenset({0, 1}))
    assert place.ids() == {"other", "nobody", "new"}
    assert place.has(SHARED) and not place.has(OWN)
    with place.store.reading() as connection:
        assert connection.execute(sql.select(images.c.hash)).scalars().all() == [name_of(SHARED)]
    entries = place.store.audit_entries()
    assert audit_chain.verify(entries) == len(entries) == 2
    assert [(entry["actor"], entry["action"]) for entry in entries] == [
        ("prediction log", "erase_patient"),
        ("prediction log", "erase_patient_files"),
    ]
    assert entries[0]["detail"] == {"counts": {"late": 2}, "image_hashes": [name_of(OWN)]}
    assert entries[1]["detail"]["image_files"] == 1


def test_a_second_erasure_moves_the_time_and_clocks_that_differ_never_move_it_back(place, monkeypatch):
    place.erase()
    between = now_us()
    place.erase()
    assert place.log.write([place.record("between", THEIRS, between)], {}).late == {0}
    with monkeypatch.context() as patch:
        patch.setattr(erased_patients, "now_us", lambda: 5)
        place.erase()
    assert place.log.write([place.record("between", THEIRS, between)], {}).late == {0}


def test_what_another_machine_spooled_before_the_erasure_is_not_replayed_after_it(place, any_store_url, tmp_path):
    second = Place(any_store_url, tmp_path, "two")
    received = now_us()
    spooled = [second.record("late", THEIRS, received, OWN), second.record("other", OTHER, received, SHARED)]
    second.log.spool_records(spooled, {name_of(OWN): OWN, name_of(SHARED): SHARED})
    place.erase()
    second.log.replay_spool()
    assert place.ids() == {"other"} and place.has(SHARED) and not place.has(OWN)
    assert list(second.log.spool.directory.iterdir()) == [], "neither spooled nor kept as damaged"
    second.store.close()


def test_pictures_of_late_records_that_cannot_be_removed_are_left_to_the_next_erasure(place, monkeypatch):
    received = now_us()
    place.erase()

    def fail(_):
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(place.images, "remove", fail)
        written = [place.record("late", THEIRS, received, OWN), place.record("other", OTHER, received)]
        assert place.log.write(written, {name_of(OWN): OWN}).num_new == 1
    assert place.has(OWN)
    assert place.erase().image_files == 1 and not place.has(OWN)


def submission(place, patient, received_at, key=None):
    request = {"image_hash": name_of(OWN), "image_suffix": ".jpg", "patient_hmac": patient, "metadata": None}
    image_row = {"hash": name_of(OWN), "suffix": ".jpg", "num_bytes": len(OWN), "stored_at": 1}
    return insert_submission(place.store, "clinic", key, request, image_row, 100, received_at)[0]["id"]


def test_a_submission_that_was_received_before_the_erasure_is_refused(place):
    received = now_us()
    place.erase()
    with pytest.raises(PatientErasedError):
        submission(place, THEIRS, received)
    with place.store.reading() as connection:
        assert connection.execute(sql.select(submissions.c.id)).all() == []
        assert connection.execute(sql.select(images.c.hash)).all() == []
    assert find_submission(place.store, submission(place, THEIRS, now_us() + 1)) is not None
    assert find_submission(place.store, submission(place, OTHER, received)) is not None
    assert find_submission(place.store, submission(place, None, received)) is not None


def meets_an_erasure(place, monkeypatch, pause, write):
    """`write` is stopped inside its transaction, after a look that found no erasure, while the patient is erased."""
    inside, go_on = threading.Event(), threading.Event()
    module, name = pause
    original = getattr(module, name)

    def stop(*arguments):
        found = original(*arguments)
        inside.set()
        assert go_on.wait(WAIT_S)
        return found

    monkeypatch.setattr(module, name, stop)
    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(WAIT_S)
    monkeypatch.setattr(module, name, original)
    erasure = threading.Thread(target=place.erase)
    erasure.start()
    if place.store.engine.dialect.name == "postgresql":
        until_one_waits(place.store)
    go_on.set()
    for thread in (writer, erasure):
        thread.join(WAIT_S)
        assert not thread.is_alive()


def until_one_waits(store):
    """Returns once a transaction waits for another's advisory lock."""
    query = sql.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    deadline = time.monotonic() + WAIT_S
    while True:
        with store.reading() as connection:
            if connection.execute(query).scalar_one():
                return
        assert time.monotonic() < deadline, "the erasure did not wait"
        time.sleep(0.01)


def test_a_commit_that_looked_before_the_erasure_is_found_by_it(place, monkeypatch):
    from store import database

    rows = [prediction_row("meets", patient_hmac=THEIRS, received_at=now_us())]
    write = lambda: place.store.insert_predictions(rows)  # noqa: E731
    meets_an_erasure(place, monkeypatch, (database, "find_late"), write)
    assert place.ids() == set()


def test_a_submission_that_looked_before_the_erasure_is_found_by_it(place, monkeypatch):
    from store import submissions as module

    received = now_us()
    meets_an_erasure(place, monkeypatch, (module, "find_late"), lambda: submission(place, THEIRS, received))
    with place.store.reading() as connection:
        assert connection.execute(sql.select(submissions.c.id)).all() == []


def test_a_label_that_is_written_during_the_erasure_goes_with_it(place, monkeypatch):
    from store import labels as module

    missed = prediction_row("p", patient_hmac=THEIRS, risk=0.1, threshold=0.5)
    place.store.insert_predictions([missed])
    label = NewLabel("p", "mel", True, "expert", comment="of the patient")
    meets_an_erasure(place, monkeypatch, (module, "_latest"), lambda: add_label(place.store, label, "clinic"))
    assert place.ids() == set()
    with place.store.reading() as connection:
        assert connection.execute(sql.select(labels.c.comment)).all() == []
    assert [alarm["detail"] for alarm in place.store.alarms()] == [{"erased": True}]


def test_one_prediction_goes_with_its_label_and_its_picture_and_the_patients_others_stay(place):
    records = [place.record("late", THEIRS, 10, OWN), place.record("new", THEIRS, 20, SHARED)]
    place.log.write(records, {name_of(OWN): OWN, name_of(SHARED): SHARED})
    add_label(place.store, NewLabel("late", "nv", False, "expert"), "clinic")
    erasure = PatientErasure(place.store, place.images, place.log.spool)
    assert erasure.erase_prediction("late", OTHER, "worker") is False
    assert erasure.erase_prediction("late", THEIRS, "worker") is True
    assert place.ids() == {"new"} and place.has(SHARED) and not place.has(OWN)
    entry = next(entry for entry in place.store.audit_entries() if entry["action"] == "erase_patient")
    assert (entry["actor"], entry["subject"]) == ("worker", f"patient/{THEIRS}")
    assert entry["detail"]["counts"] == {"alarms": 0, "labels": 1, "predictions": 1, "images": 1}
    assert erasure.erase_prediction("late", THEIRS, "worker") is False


def test_who_names_no_patient_pays_for_no_look(place, monkeypatch):
    statements = []
    sql.event.listen(place.store.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    assert isinstance(place.store, Store)
    place.store.insert_predictions([prediction_row("a"), prediction_row("b")])
    assert [text for text in statements if "erased_patients" in text or "advisory" in text] == []
    many = [prediction_row(f"p{index}", patient_hmac=f"{index:064x}", received_at=now_us()) for index in range(2000)]
    place.store.insert_predictions(many)
    assert len([text for text in statements if "erased_patients" in text]) == 1
