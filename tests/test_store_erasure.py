"""An erased patient is gone from rows, files, spool and free pages; others are not; an interrupted call is finished."""

from __future__ import annotations

import hashlib
import sqlite3
import threading

import pytest

from monitoring.prediction_log import PredictionLog, PredictionRecord
from store import audit_chain, connection
from store.database import Store, StoreUnavailableError, open_store
from store.erasure import PatientErasure
from store.image_files import ImageFiles
from store.labels import NewLabel, add_label
from store.prediction_records import PredictionFilter, predictions_page
from store.spool import Spool
from store.submissions import claim_submissions, find_submission, insert_submission
from tests.log_rows import prediction_row

THEIRS, OTHER = "a" * 64, "b" * 64
OWN, SHARED, SPOOLED = (b"\xff\xd8 picture " + name for name in (b"own", b"shared", b"spooled"))


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image_row(data: bytes) -> dict:
    return {"hash": name_of(data), "suffix": ".jpg", "num_bytes": len(data), "stored_at": 1}


class Place:
    """A store, images and a spool, with two patients who share a picture."""

    def __init__(self, folder):
        self.folder = folder
        self.store = open_store(f"sqlite:///{folder}/store.db")
        self.images = ImageFiles(str(folder / "images"))
        self.spool = Spool(folder / "spool")
        self.images.put_many([OWN, SHARED])
        self.store.insert_predictions(
            [
                prediction_row(
                    "own", patient_hmac=THEIRS, image_hash=name_of(OWN), risk=0.1, threshold=0.5, device="secretdevice"
                ),
                prediction_row("shared", patient_hmac=THEIRS, image_hash=name_of(SHARED)),
                prediction_row("other", patient_hmac=OTHER, image_hash=name_of(SHARED), risk=0.1, threshold=0.5),
                prediction_row("nobody"),
            ],
            [image_row(OWN), image_row(SHARED)],
        )
        for prediction in ("own", "other"):
            add_label(self.store, NewLabel(prediction, "mel", True, f"expert of {prediction}"), "clinic")

    def erase(self, patient=THEIRS):
        return PatientErasure(self.store, self.images, self.spool).erase(patient, "admin")

    def ids(self):
        return {row["id"] for row in predictions_page(self.store, PredictionFilter(), None, 200)}

    def pictures(self):
        return {data for data in (OWN, SHARED, SPOOLED) if self.has(data)}

    def has(self, data):
        try:
            return self.images.get(name_of(data), ".jpg") == data
        except FileNotFoundError:
            return False

    def replay(self):
        self.spool.replay(lambda rows, images: self.store.insert_predictions(rows))


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.store.close()


def test_everything_of_the_patient_goes_and_nothing_of_others(place):
    erasure = place.erase()
    assert erasure.counts == {"predictions": 2, "labels": 1, "images": 1, "alarms": 1, "spooled": 0, "submissions": 0}
    assert erasure.image_files == 1 and erasure.log_emptied
    assert place.ids() == {"other", "nobody"} and place.pictures() == {SHARED}
    assert place.store.image_suffix(name_of(SHARED)) == ".jpg" and place.store.image_suffix(name_of(OWN)) is None
    alarms = {alarm["id"]: alarm for alarm in place.store.alarms()}
    erased, others = alarms[1], alarms[2]
    assert erased["detail"] == {"erased": True} and "own" not in erased["message"] + erased["dedupe_key"]
    assert erased["kind"] == "missed_cancer" and others["detail"]["prediction_id"] == "other"


def test_the_tombstone_says_who_and_how_much_and_comes_once(place):
    place.erase()
    entries = [entry for entry in place.store.audit_entries() if entry["subject"] == f"patient/{THEIRS}"]
    rows, files = entries
    assert (rows["actor"], rows["action"]) == ("admin", "erase_patient")
    assert rows["detail"]["counts"]["predictions"] == 2 and rows["detail"]["image_hashes"] == [name_of(OWN)]
    assert files["detail"]["image_files"] == 1
    again = place.erase()
    assert set(again.counts.values()) == {0} and again.image_files == 0
    unknown = place.erase("c" * 64)
    assert set(unknown.counts.values()) == {0}
    chain = place.store.audit_entries()
    assert audit_chain.verify(chain) == len(chain) == 4  # two labels, two of the erasure


def test_deleted_bytes_are_in_no_file_of_the_database(place):
    def holding():
        return [path.name for path in place.folder.glob("store.db*") if b"secretdevice" in path.read_bytes()]

    assert holding() != []
    assert place.erase().log_emptied
    assert holding() == []


def test_a_reader_that_holds_the_log_is_reported_and_the_next_call_empties_it(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_MS", 50)
    place = Place(tmp_path)
    reader = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM predictions").fetchone()
    assert place.erase().log_emptied is False
    reader.execute("COMMIT")
    assert place.erase().log_emptied is True
    assert (tmp_path / "store.db-wal").stat().st_size == 0


def test_a_picture_goes_with_the_last_patient_who_shares_it(place):
    place.erase()
    assert place.erase(OTHER).image_files == 1
    assert place.pictures() == set() and place.ids() == {"nobody"}


@pytest.mark.parametrize("step", ["spool", "files"])
def test_an_erasure_interrupted_after_the_rows_is_finished_by_the_same_call(place, monkeypatch, step):
    place.spool.append([prediction_row("waits", patient_hmac=THEIRS)], {})

    def fail(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(*{"spool": (Spool, "erase_patient"), "files": (ImageFiles, "remove")}[step], fail)
        with pytest.raises(StoreUnavailableError, match="power cut"):
            place.erase()
    assert place.ids() == {"other", "nobody"} and place.has(OWN)
    place.replay()
    assert place.erase().image_files == 1
    assert place.pictures() == {SHARED} and place.ids() == {"other", "nobody"} and place.spool.pending() == 0
    assert place.erase().image_files == 0


def test_a_picture_uploaded_again_before_the_files_were_removed_is_kept(place, monkeypatch):
    def fail(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "remove", fail)
        with pytest.raises(StoreUnavailableError):
            place.erase()
    place.store.insert_predictions(
        [prediction_row("new", patient_hmac=OTHER, image_hash=name_of(OWN))], [image_row(OWN)]
    )
    assert place.erase().image_files == 0
    assert place.has(OWN)


def test_spooled_rows_of_the_patient_are_never_replayed_and_others_are(place):
    spooled = [
        prediction_row("s1", patient_hmac=THEIRS, image_hash=name_of(SPOOLED)),
        prediction_row("s2", patient_hmac=OTHER, image_hash=name_of(SHARED)),
        prediction_row("s3", patient_hmac=THEIRS, image_hash=name_of(SHARED)),
    ]
    mixed = place.spool.append(spooled, {name_of(SPOOLED): SPOOLED, name_of(SHARED): SHARED})
    place.spool.append([prediction_row("s4", patient_hmac=THEIRS)], {})
    # Written by a replay whose rows the store then did not take.
    place.images.put(SPOOLED)
    assert place.erase().counts["spooled"] == 3
    assert place.spool.pending() == 1 and name_of(SPOOLED).encode() not in mixed.read_bytes()
    assert f'{{"image": "{name_of(SHARED)}"'.encode() in mixed.read_bytes()
    assert place.pictures() == {SHARED}
    place.replay()
    assert place.ids() == {"other", "nobody", "s2"}


def test_damaged_batches_and_interrupted_appends_are_searched_too(place):
    path = place.spool.append([prediction_row("keep"), prediction_row("torn", patient_hmac=THEIRS)], {})
    text = path.read_bytes()
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(text[:-3])
    path.unlink()
    leftover = place.spool.directory / ".1.spool.2.tmp"
    leftover.write_bytes(text[:-9])
    assert place.erase().counts["spooled"] == 1
    assert THEIRS.encode() not in damaged.read_bytes() and b'"keep"' in damaged.read_bytes()
    assert not leftover.exists()


def test_the_patients_submissions_go_in_whatever_state_and_others_keep_their_pictures(place):
    def submit(data, patient, key):
        request = {"image_hash": name_of(data), "image_suffix": ".jpg", "patient_hmac": patient, "metadata": None}
        return insert_submission(place.store, "clinic", key, request, image_row(data), 100)[0]["id"]

    place.images.put(SPOOLED)
    waits, theirs = submit(SPOOLED, THEIRS, "1"), submit(OWN, OTHER, "2")
    claimed = submit(SHARED, THEIRS, "3")
    assert len(claim_submissions(place.store, 10, 60_000_000, 3, "spent")) == 3
    erasure = place.erase()
    assert erasure.counts["submissions"] == 2
    assert find_submission(place.store, waits) is find_submission(place.store, claimed) is None
    # OWN was the erased patient's prediction and is another's submission; SPOOLED was theirs alone.
    assert find_submission(place.store, theirs) is not None
    assert place.pictures() == {SHARED, OWN}


def finished_in_time(work, meanwhile) -> bool:
    """Runs `work` in a thread while `meanwhile` goes on; whether it ended before `meanwhile` let go."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.3)
    early = not thread.is_alive()
    meanwhile.set()
    thread.join(30)
    assert not thread.is_alive()
    return early


def test_a_replay_that_has_read_a_batch_does_not_bring_its_rows_back(place):
    place.spool.append([prediction_row("waits", patient_hmac=THEIRS)], {})
    reading, go_on = threading.Event(), threading.Event()

    def write(rows, images):
        reading.set()
        assert go_on.wait(30)
        place.store.insert_predictions(rows)

    replay = threading.Thread(target=place.spool.replay, args=(write,))
    replay.start()
    assert reading.wait(30)
    assert finished_in_time(place.erase, go_on) is False
    replay.join(30)
    assert place.ids() == {"other", "nobody"} and place.spool.pending() == 0


def test_a_picture_being_written_again_for_another_patient_is_not_removed(place, monkeypatch):
    log = PredictionLog(f"sqlite:///{place.folder}/store.db", str(place.folder / "images"), str(place.folder / "spool"))
    on_disk, go_on = threading.Event(), threading.Event()
    insert = Store.insert_predictions

    def wait_and_insert(store, rows, image_rows):
        on_disk.set()
        assert go_on.wait(30)
        return insert(store, rows, image_rows)

    monkeypatch.setattr(Store, "insert_predictions", wait_and_insert)
    record = PredictionRecord(
        id="again", patient_hmac=OTHER, image_hash=name_of(OWN), model_version="1", context="none"
    )
    writer = threading.Thread(target=log.write, args=([record], {name_of(OWN): OWN}))
    writer.start()
    assert on_disk.wait(30)
    assert finished_in_time(place.erase, go_on) is False
    writer.join(30)
    assert place.ids() == {"other", "nobody", "again"}
    assert place.has(OWN) and place.store.image_suffix(name_of(OWN)) == ".jpg"
    log.store.close()
