"""What several experts' labels come to: one truth per prediction, or a disagreement that a third settles."""

from __future__ import annotations

import random
import re

import pytest
import sqlalchemy as sql

from store.database import open_store
from store.label_consensus import consensus, truths_between, truths_labelled_after, truths_of
from store.labels import NewLabel, add_label
from store.prediction_records import PredictionFilter, predictions_page
from tests.log_rows import prediction_row


def row(number, label="mel", labeller="a", adjudication=False, at=None, prediction="p"):
    return {
        "id": number,
        "prediction_id": prediction,
        "label": label,
        "malignant": label in ("mel", "bcc"),
        "labeller": labeller,
        "labelled_at": number if at is None else at,
        "adjudication": adjudication,
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(1)], ("mel", True, "single", 1, (1,))),
        ([row(1), row(2, "nv")], ("nv", False, "single", 1, (2,))),
        ([row(1), row(2, labeller="b")], ("mel", True, "agreed", 2, (1, 2))),
        ([row(1), row(2, "bcc", "b")], (None, True, "disagreed", 2, (1, 2))),
        ([row(1), row(2, "nv", "b")], (None, None, "disagreed", 2, (1, 2))),
        ([row(1), row(2, "nv", "b"), row(3, "nv", "a")], ("nv", False, "agreed", 2, (2, 3))),
        ([row(1), row(2, "nv", "b"), row(3, "nv", "c")], (None, None, "disagreed", 3, (1, 2, 3))),
        ([row(1), row(2, "nv", "b"), row(3, "nv", "c", True)], ("nv", False, "adjudicated", 2, (3,))),
        # A reader who comes after the settlement does not undo it; a newer settlement does.
        ([row(1), row(2, "nv", "c", True), row(3, "bcc", "d")], ("nv", False, "adjudicated", 2, (2,))),
        ([row(1), row(2, "nv", "c", True), row(3, "bcc", "d", True)], ("bcc", True, "adjudicated", 1, (3,))),
        # Who settles and corrects it to a plain label is a reader again.
        ([row(1), row(2, "nv", "c", True), row(3, "mel", "c")], ("mel", True, "agreed", 2, (1, 3))),
    ],
)
def test_what_labels_come_to(rows, expected):
    random.Random(3).shuffle(rows)
    (truth,) = consensus(rows)
    assert (truth.label, truth.malignant, truth.state, truth.readers, truth.label_ids) == expected


def test_times_are_of_the_first_label_ever_and_of_the_last_that_counts():
    (truth,) = consensus([row(1, at=50), row(2, "nv", at=90), row(3, "nv", "b", at=70)])
    assert (truth.first_labelled_at, truth.labelled_at) == (50, 90)


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def test_truths_of_a_window_are_of_the_champions_answers_in_it(store):
    store.insert_predictions(
        [
            prediction_row("before", received_at=9),
            prediction_row("first", received_at=10),
            prediction_row("other model", received_at=11, model_version="2"),
            prediction_row("shadow", received_at=11, role="shadow"),
            prediction_row("unlabelled", received_at=12),
            prediction_row("after", received_at=20),
        ]
    )
    for name in ("before", "shadow", "after", "other model", "first"):
        add_label(store, NewLabel(name, "nv", False, "a"), "clinic")
    add_label(store, NewLabel("first", "mel", True, "b"), "clinic")
    assert [truth.prediction_id for truth in truths_between(store, 10, 20)] == ["first", "other model"]
    (truth,) = truths_between(store, 10, 20, model_version="1")
    assert (truth.prediction_id, truth.state, truth.label_ids) == ("first", "disagreed", (5, 6))
    assert list(truths_of(store, ["first", "unlabelled", "unknown"])) == ["first"]


def test_new_labels_are_walked_once_each_with_all_of_their_predictions_labels(store):
    store.insert_predictions([prediction_row(name) for name in ("p", "q")])
    for name, labeller in (("q", "a"), ("p", "a"), ("q", "b")):
        add_label(store, NewLabel(name, "nv", False, labeller), "clinic")
    first, last = truths_labelled_after(store, 0, 2)
    assert [(truth.prediction_id, truth.readers) for truth in first] == [("p", 1), ("q", 2)] and last == 2
    rest, last = truths_labelled_after(store, last, 2)
    assert [truth.prediction_id for truth in rest] == ["q"] and last == 3
    assert truths_labelled_after(store, last, 2) == ([], 3)


def test_the_database_finds_the_same_state_as_the_rule(store):
    rng = random.Random(5)
    names = [f"p{number:02d}" for number in range(40)]
    store.insert_predictions([prediction_row(name) for name in names])
    for _ in range(150):
        label = rng.choice(["nv", "nv", "nv", "mel", "bcc"])
        who, settles = (rng.choice("abc"), False) if rng.random() < 0.93 else ("judge", True)
        add_label(store, NewLabel(rng.choice(names), label, label != "nv", who, adjudication=settles), "clinic")
    truths = truths_of(store, names)
    for state in ("single", "agreed", "disagreed", "adjudicated"):
        expected = {name for name, truth in truths.items() if truth.state == state}
        assert len(expected) > 1
        page = predictions_page(store, PredictionFilter(label_state=state), None, 100)
        assert {row["id"] for row in page} == expected


def test_on_sqlite_a_page_of_disagreements_does_not_walk_the_log(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    statements = []
    sql.event.listen(store.engine, "before_cursor_execute", lambda *given: statements.append((given[2], given[3])))
    predictions_page(store, PredictionFilter(label_state="disagreed"), None, 10)
    statement, parameters = statements[-1]
    with store.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    (reached,) = [row[3] for row in plan if re.match(r"(SEARCH|SCAN) predictions\b", row[3])]
    assert reached == "SEARCH predictions USING INDEX sqlite_autoindex_predictions_1 (id=?)"
