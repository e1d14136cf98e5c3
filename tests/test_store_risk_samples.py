"""Which answers count for the distribution of risks, and which for the quality. On both databases."""

from __future__ import annotations

import pytest

from store.database import open_store
from store.labels import NewLabel, add_label
from store.risk_samples import LabelledRisk, Risk, labelled_risks, recent_risks
from tests.log_rows import prediction_row

START, END = 1_000, 2_000


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def put(store, name: str, **values) -> None:
    base = {"received_at": 1_500, "risk": 0.1, "threshold": 0.02, "model_version": "3", "context": "none"}
    store.insert_predictions([prediction_row(name, **(base | values))])


def say(store, name: str, malignant: bool, reader: str = "Ada", at: int = 1_600) -> None:
    label = "malignant" if malignant else "benign"
    assert add_label(store, NewLabel(name, label, malignant, reader, labelled_at=at), reader) is not None


def with_others(store) -> None:
    """Answers that are none of this model's scored ones in the window."""
    put(store, "before", received_at=START - 1)
    put(store, "after", received_at=END)
    put(store, "another model", model_version="2")
    put(store, "shadow", role="shadow")
    put(store, "no risk", risk=None, abstained=True)
    put(store, "no threshold", threshold=None)


def test_the_newest_scored_answers_of_the_model_are_sampled(store):
    with_others(store)
    for index in range(4):
        put(store, f"p{index}", received_at=START + index, risk=index / 10)
    assert recent_risks(store, "3", START, END, limit=3) == [Risk("none", risk, 0.02) for risk in (0.3, 0.2, 0.1)]
    assert len(recent_risks(store, "3", START, END)) == 4


def test_labelled_answers_are_those_whose_readers_agree(store):
    with_others(store)
    for name in ("before", "after", "another model", "shadow", "no risk", "no threshold"):
        say(store, name, True)
    put(store, "cancer", risk=0.7, patient_hmac="f" * 64)
    put(store, "benign", context="image_only")
    put(store, "two views")
    put(store, "unread")
    say(store, "cancer", True)
    say(store, "benign", True)
    say(store, "benign", False, at=1_700)
    say(store, "two views", True, "Ada")
    say(store, "two views", False, "Ben")
    rows, truncated = labelled_risks(store, "3", START, END)
    assert sorted(rows, key=lambda row: row.risk) == [
        LabelledRisk("image_only", 0.1, 0.02, False, "benign"),
        LabelledRisk("none", 0.7, 0.02, True, "f" * 64),
    ]
    assert not truncated


def test_of_too_many_labels_the_newest_are_looked_at_and_that_is_told(store):
    for index in range(4):
        put(store, f"p{index}", risk=index / 10)
        say(store, f"p{index}", True, at=1_600 + index)
    rows, truncated = labelled_risks(store, "3", START, END, limit=2)
    assert truncated and {row.risk for row in rows} <= {0.3, 0.2, 0.1} and 0.3 in {row.risk for row in rows}
    assert labelled_risks(store, "3", START, END, limit=4)[1] is False
