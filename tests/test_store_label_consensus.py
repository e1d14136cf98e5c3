"""What several experts' labels come to: one truth per prediction, or a disagreement that a third settles."""

from __future__ import annotations

import random

import pytest

from store.database import open_store
from store.label_consensus import consensus, truths_between, truths_labelled_after, truths_of
from store.labels import NewLabel, add_label
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
