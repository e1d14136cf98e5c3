"""The order in which lesions are read, and by whom."""

from __future__ import annotations

import pytest
import sqlalchemy as sql

from store.database import open_store
from store.labels import NewLabel, add_label
from store.review_queue import QueueItem, patient_lesions, review_queue
from store.tables import images, predictions
from tests.log_rows import prediction_row

HASH = "a" * 64


@pytest.fixture
def log(any_store_url):
    """A store of each kind, with one picture."""
    store = open_store(any_store_url)
    with store.writing() as connection:
        connection.execute(sql.insert(images).values(hash=HASH, suffix=".jpg", num_bytes=1, stored_at=0))
    yield store
    store.close()


def put(store, name: str, **fields) -> None:
    values = {"image_hash": HASH, "threshold": 0.02, "risk": 0.02, "received_at": 100} | fields
    row = prediction_row(name, **values)
    with store.writing() as connection:
        connection.execute(sql.insert(predictions).values(**row))


def say(store, name: str, reader: str, malignant: bool, **fields) -> None:
    label = "malignant" if malignant else "benign"
    assert add_label(store, NewLabel(name, label, malignant, reader, **fields), reader) is not None


def names(store, reader: str = "Ada", **options) -> list[str]:
    return [item.prediction_id for item in review_queue(store, reader, 0, **options).items]


def test_missed_cancers_come_first_then_disagreements_abstentions_the_uncertain_and_the_oldest(log):
    put(log, "sure", risk=0.9)
    put(log, "less sure", risk=0.001)
    put(log, "uncertain, new", risk=0.025, received_at=200)
    put(log, "uncertain, old", risk=0.025)
    put(log, "no answer", risk=None, abstained=True, band=None)
    put(log, "two views", risk=0.5)
    put(log, "missed", risk=0.001)
    say(log, "missed", "Ben", True)
    say(log, "two views", "Ben", True)
    say(log, "two views", "Cleo", False)
    assert review_queue(log, "Ada", 0).items[:3] == [
        QueueItem("missed", "second_reading"),
        QueueItem("two views", "adjudication"),
        QueueItem("no answer", "abstained"),
    ]
    assert names(log)[3:] == ["uncertain, old", "uncertain, new", "less sure", "sure"]


def test_nobody_reads_a_lesion_twice_or_settles_their_own_disagreement(log):
    for name in ("missed", "two views", "plain"):
        put(log, name, risk=0.001)
    say(log, "missed", "Ben", True)
    say(log, "two views", "Ben", False)
    say(log, "two views", "Cleo", True)
    say(log, "plain", "Cleo", False)
    assert names(log, "Ben") == []
    assert names(log, "Cleo") == ["missed"]
    assert sorted(names(log, "Ada")) == ["missed", "two views"]


def test_a_second_reading_ends_the_queue_s_interest_in_a_missed_cancer(log):
    put(log, "missed", risk=0.001)
    say(log, "missed", "Ben", True)
    say(log, "missed", "Ada", True)
    assert names(log, "Cleo") == []
    (alarm,) = log.alarms()
    put(log, "other", risk=0.001)
    say(log, "other", "Ben", True)
    assert names(log, "Cleo") == ["other"] and alarm["kind"] == "missed_cancer"


def test_old_unread_lesions_shadows_and_lesions_without_a_picture_are_left_alone(log):
    put(log, "old", received_at=5)
    put(log, "erased", image_hash="b" * 64)
    put(log, "shadow", role="shadow")
    put(log, "new", received_at=50)
    assert [item.prediction_id for item in review_queue(log, "Ada", 10).items] == ["new"]


def test_what_was_put_off_comes_last(log):
    for index in range(3):
        put(log, f"p{index}", received_at=100 + index)
    assert names(log, skipped=frozenset({"p0"})) == ["p1", "p2", "p0"]


def test_readers_see_how_many_they_have_read_and_how_many_are_left(log):
    for index in range(4):
        put(log, f"p{index}")
    say(log, "p0", "Ada", False)
    say(log, "p0", "Ada", True)
    queue = review_queue(log, "Ada", 0)
    assert (queue.done, len(queue.items)) == (1, 3)
    # Ada's second thoughts called cancer what the model had let pass or not: either way others still have theirs.
    assert review_queue(log, "Ben", 0).done == 0


def test_a_lesion_whose_threshold_is_unknown_comes_after_those_that_can_be_compared(log):
    put(log, "unknown", threshold=None)
    put(log, "sure", risk=0.9)
    put(log, "risk of none", risk=0.0)
    assert names(log) == ["sure", "risk of none", "unknown"]


def test_only_the_newest_unread_are_put_in_order_and_what_is_read_takes_no_place_among_them(log, monkeypatch):
    monkeypatch.setattr("store.review_queue.MAX_ORDERED", 2)
    for index in range(5):
        put(log, f"p{index}", received_at=100 + index)
    say(log, "p4", "Ben", False)
    assert names(log) == ["p2", "p3"]


def test_a_patient_s_other_lesions_come_without_anything_that_the_model_said(log):
    patient = "c" * 64
    for index in range(3):
        put(log, f"p{index}", patient_hmac=patient, received_at=100 + index)
    put(log, "someone else's", patient_hmac="d" * 64)
    others = patient_lesions(log, "p1")
    assert [other["id"] for other in others] == ["p2", "p0"]
    assert set(others[0]) == {"id", "received_at", "metadata"}
    put(log, "nobody's")
    assert patient_lesions(log, "nobody's") == []
