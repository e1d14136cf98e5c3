"""Pages of the log hold every record once, whatever arrives meanwhile, and filters mean what they say."""

from __future__ import annotations

import pytest
import sqlalchemy as sql

from store.database import open_store
from store.prediction_records import (
    PredictionFilter,
    prediction_image,
    prediction_with_labels,
    predictions_page,
)
from store.tables import labels
from tests.log_rows import label_row, prediction_row


@pytest.fixture
def store(tmp_path):
    opened = open_store(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def found(store, limit=200, after=None, **wanted):
    return [row["id"] for row in predictions_page(store, PredictionFilter(**wanted), after, limit)]


def test_pages_neither_skip_nor_repeat_while_rows_of_the_same_time_arrive(store):
    first = [prediction_row(f"m{index:02d}", received_at=1_000 + index // 6) for index in range(20)]
    store.insert_predictions(first)
    seen, after, number = [], None, 0
    while (page := predictions_page(store, PredictionFilter(), after, 3)) and number < 100:
        seen += [(row["received_at"], row["id"]) for row in page]
        after = seen[-1]
        # Of the very time at which this page ended, on both sides of its last id, and newer ones.
        store.insert_predictions(
            [
                prediction_row(f"a{number}", received_at=after[0]),
                prediction_row(f"z{number}", received_at=after[0]),
                prediction_row(f"n{number}", received_at=9_000 + number),
            ]
            if number < 5
            else []
        )
        number += 1
    assert len(seen) == len(set(seen)) and seen == sorted(seen, reverse=True)
    assert {row["id"] for row in first} <= {id_ for _, id_ in seen}
    # Behind the reader: still to come. Before it: only a new reading shows them.
    assert "a0" in {id_ for _, id_ in seen} and "z0" not in {id_ for _, id_ in seen}
    assert found(store)[0] == "n4"


def test_a_filter_gives_the_rows_that_fit_and_no_others(store):
    rows = {
        "plain": {"received_at": 10, "risk": 0.2, "band": "low"},
        "high": {"received_at": 20, "risk": 0.9, "band": "high", "model_version": "2"},
        "none": {"received_at": 30, "abstained": True, "reasons": ["blurred"]},
        "theirs": {"received_at": 40, "risk": 0.5, "patient_hmac": "a" * 64, "institution": "clinic", "device": "d"},
        "picture": {"received_at": 50, "risk": 0.5, "context": "image_only"},
        "shadow": {"received_at": 60, "risk": 0.5, "role": "shadow"},
    }
    store.insert_predictions([prediction_row(name, **values) for name, values in rows.items()])
    with store.writing() as connection:
        connection.execute(sql.insert(labels), [label_row("high"), label_row("high", labeller="y")])
    assert found(store) == ["picture", "theirs", "none", "high", "plain"]
    assert found(store, from_us=20, to_us=40) == ["none", "high"]
    assert found(store, model_version="2") == found(store, band="high") == ["high"]
    assert found(store, abstained=True) == ["none"]
    assert found(store, abstained=False, to_us=40) == ["high", "plain"]
    assert found(store, context="image_only") == ["picture"]
    assert found(store, patient_hmac="a" * 64) == found(store, institution="clinic") == found(store, device="d")
    assert found(store, device="d") == ["theirs"] and found(store, institution="Clinic") == []
    assert found(store, labelled=True) == ["high"] and "high" not in found(store, labelled=False)
    assert found(store, min_risk=0.5) == ["picture", "theirs", "high"] and found(store, max_risk=0.2) == ["plain"]
    assert found(store, role="shadow") == ["shadow"]
    (row,) = predictions_page(store, PredictionFilter(labelled=True), None, 5)
    assert row["labelled"] is True and "embedding" not in row and row["metadata"] == {"age_approx": 50.0}


def plan(store, after=None, **wanted):
    """SQLite's plan of the page's own statement."""
    statements = []

    def remember(_connection, _cursor, statement, parameters, _context, _many):
        statements.append((statement, parameters))

    sql.event.listen(store.engine, "before_cursor_execute", remember)
    found(store, after=after, **wanted)
    sql.event.remove(store.engine, "before_cursor_execute", remember)
    (query,) = [item for item in statements if item[0].startswith("SELECT")]
    with store.reading() as connection:
        return [step[-1] for step in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + query[0], query[1])]


def test_a_page_is_read_off_an_index_and_not_sorted_out_of_the_whole_log(store):
    for steps in (plan(store), plan(store, after=(5, "x")), plan(store, abstained=True, from_us=5)):
        assert "USING INDEX ix_predictions_role_received_at" in steps[0]
        assert all("RIGHT PART" in step for step in steps if "TEMP B-TREE" in step)
    assert "USING INDEX ix_predictions_patient_hmac" in plan(store, patient_hmac="a" * 64)[0]


def test_a_record_comes_with_its_labels_and_the_suffix_of_its_picture(store):
    image = {"hash": "h" * 64, "suffix": ".png", "num_bytes": 3, "stored_at": 1}
    store.insert_predictions(
        [prediction_row("a", image_hash="h" * 64), prediction_row("gone", image_hash="g" * 64), prediction_row("bare")],
        [image],
    )
    with store.writing() as connection:
        connection.execute(sql.insert(labels), [label_row("a", label="nv"), label_row("a", label="mel")])
    row, given = prediction_with_labels(store, "a")
    assert row["id"] == "a" and [label["label"] for label in given] == ["nv", "mel"]
    assert prediction_with_labels(store, "b") is None
    assert prediction_image(store, "a") == ("h" * 64, ".png")
    assert prediction_image(store, "gone") == ("g" * 64, None)
    assert prediction_image(store, "bare") == (None, None) and prediction_image(store, "b") is None
