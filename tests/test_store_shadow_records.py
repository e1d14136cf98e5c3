"""A shadow's records go where the champion's are, and nowhere after the patient was erased."""

from __future__ import annotations

import threading

import pytest

from store.database import open_store
from store.erasure import PatientErasure
from store.image_files import ImageFiles
from store.shadow_records import shadow_id
from store.spool import Spool
from tests.log_rows import prediction_row

PATIENT, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def shadow_row(champion_id: str, **values):
    return prediction_row(shadow_id(champion_id), role="shadow", model_version="2", **values)


def ids(store, role="champion"):
    return [row["id"] for row in store.predictions_between(0, 2**62, role)]


def erase(store, folder):
    return PatientErasure(store, ImageFiles(str(folder / "images")), Spool(folder / "spool")).erase(PATIENT, "admin")


def test_a_shadow_is_stored_beside_its_champion_once_and_never_without(store):
    store.insert_predictions([prediction_row("a"), prediction_row("b")])
    assert store.insert_predictions([shadow_row("a"), shadow_row("unknown")]).num_new == 1
    assert store.insert_predictions([shadow_row("a", risk=0.5)]).num_new == 0
    assert ids(store, "shadow") == ["a.shadow"] and ids(store) == ["a", "b"]
    # As the spool replays them.
    assert store.insert_predictions([shadow_row("c"), prediction_row("c")]).num_new == 2
    assert ids(store, "shadow") == ["a.shadow", "c.shadow"]


def test_more_shadows_than_a_statement_takes_parameters(store):
    rows = [prediction_row(f"{number:05d}") for number in range(1200)]
    store.insert_predictions(rows)
    assert store.insert_predictions([shadow_row(row["id"]) for row in rows] + [shadow_row("unknown")]).num_new == 1200


def test_an_erased_patients_shadows_go_and_do_not_come_back(store, tmp_path):
    theirs, other = {"patient_hmac": PATIENT}, {"patient_hmac": OTHER}
    store.insert_predictions([prediction_row(name, **theirs) for name in "ab"] + [prediction_row("c", **other)])
    store.insert_predictions([shadow_row("a", **theirs), shadow_row("c", **other)])
    assert erase(store, tmp_path).counts["predictions"] == 3
    assert ids(store, "shadow") == ["c.shadow"]
    # Answered before the erasure, written after it.
    assert store.insert_predictions([shadow_row("b", **theirs)]).num_new == 0
    assert ids(store, "shadow") == ["c.shadow"] and ids(store) == ["c"]


def test_no_shadow_slips_through_an_erasure_at_the_same_time(store, tmp_path):
    theirs = {"patient_hmac": PATIENT}
    names = [f"{number:03d}" for number in range(100)]
    store.insert_predictions([prediction_row(name, **theirs) for name in names])
    start = threading.Barrier(2)

    def write() -> None:
        start.wait()
        for name in names:
            store.insert_predictions([shadow_row(name, **theirs)])

    writer = threading.Thread(target=write)
    writer.start()
    start.wait()
    erase(store, tmp_path)
    writer.join()
    assert ids(store, "shadow") == ids(store) == []
