"""Labels are appended, corrected by name, and a missed cancer is an alarm once, in the label's own transaction."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sql

from store import audit_chain
from store import labels as label_store
from store.database import open_store
from store.labels import NewLabel, ReaderAdjudicatesError, add_label
from store.tables import labels
from tests.log_rows import prediction_row


@pytest.fixture
def store(tmp_path):
    opened = open_store(f"sqlite:///{tmp_path}/store.db")
    opened.insert_predictions(
        [
            prediction_row("low", risk=0.01, threshold=0.05),
            prediction_row("at", risk=0.05, threshold=0.05),
            prediction_row("abstained", abstained=True, threshold=0.05),
            prediction_row("shadow", role="shadow", risk=0.01, threshold=0.05),
        ]
    )
    yield opened
    opened.close()


def malignant(prediction_id="low", **values):
    return NewLabel(**({"prediction_id": prediction_id, "label": "mel", "malignant": True, "labeller": "x"} | values))


def rows(store):
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(sql.select(labels).order_by(labels.c.id)).mappings()]


def test_a_missed_cancer_raises_one_alarm_and_says_which(store):
    added = add_label(store, malignant(comment="histology"), "clinic")
    assert added.is_new and added.alarm["dedupe_key"] == "missed_cancer:low"
    (alarm,) = store.alarms()
    assert (alarm["kind"], alarm["severity"], alarm["model_version"]) == ("missed_cancer", "critical", "1")
    assert alarm["detail"]["prediction_id"] == "low" and alarm["detail"]["label_id"] == added.row["id"]
    assert "low" in alarm["message"] and "0.01" in alarm["message"]
    assert add_label(store, malignant(labeller="y"), "clinic").alarm is None
    assert len(store.alarms()) == 1


def test_no_alarm_where_no_answer_called_it_negative(store):
    for name in ("at", "abstained", "shadow"):
        assert add_label(store, malignant(name), "clinic").alarm is None
    assert add_label(store, malignant(label="nv", malignant=False), "clinic").alarm is None
    assert store.alarms() == []


def test_two_malignant_labels_at_once_are_two_rows_and_one_alarm(store):
    start, outcomes = threading.Barrier(4), []

    def run(name):
        start.wait()
        outcomes.append(add_label(store, malignant(labeller=name), name))

    threads = [threading.Thread(target=run, args=(f"expert {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows(store)) == 4 and len(store.alarms()) == 1
    assert sorted(outcome.alarm is not None for outcome in outcomes) == [False, False, False, True]


def test_a_repeated_label_is_stored_once_and_a_corrected_one_names_what_it_corrects(store):
    first = add_label(store, malignant(confidence=0.5), "clinic")
    again = add_label(store, malignant(confidence=0.5), "clinic")
    assert again.is_new is False and again.row == first.row
    assert add_label(store, malignant(confidence=0.5, labelled_at=first.row["labelled_at"]), "clinic").is_new is False
    corrected = add_label(store, malignant(label="nv", malignant=False), "clinic")
    back = add_label(store, malignant(confidence=0.5), "clinic")
    assert corrected.row["supersedes"] == first.row["id"] and back.row["supersedes"] == corrected.row["id"]
    other = add_label(store, malignant(labeller="y"), "clinic")
    assert other.row["supersedes"] is None
    stored = rows(store)
    assert [row["label"] for row in stored] == ["mel", "nv", "mel", "mel"]
    assert stored[0] == first.row
    assert add_label(store, malignant("unknown"), "clinic") is None
    entries = store.audit_entries()
    assert audit_chain.verify(entries) == 4
    assert {(entry["actor"], entry["action"], entry["subject"]) for entry in entries} == {
        ("clinic", "label", "prediction/low")
    }


def test_a_label_without_its_alarm_is_not_stored(store, monkeypatch):
    def fail(*_):
        raise ValueError("no alarm")

    monkeypatch.setattr(label_store, "_missed_cancer_alarm", fail)
    with pytest.raises(ValueError, match="no alarm"):
        add_label(store, malignant(), "clinic")
    assert rows(store) == [] and store.audit_entries() == []


def test_an_adjudication_is_a_third_persons(store):
    add_label(store, malignant(labeller="Dr Weber"), "clinic")
    add_label(store, malignant(label="nv", malignant=False, labeller="y"), "clinic")
    for name in ("Dr Weber", " dr  weber", "y"):
        with pytest.raises(ReaderAdjudicatesError, match="has read prediction 'low'"):
            add_label(store, malignant(labeller=name, adjudication=True), "clinic")
    assert len(rows(store)) == 2
    settled = add_label(store, malignant(labeller="z", adjudication=True), "clinic")
    assert settled.is_new and rows(store)[-1]["adjudication"] is True
    # Who settled may correct that; the same word as a plain label is another thing to say.
    assert add_label(store, malignant(labeller="z", label="bcc", adjudication=True), "clinic").is_new


def imported(external_id, at, **values):
    return malignant(source="label_studio", external_id=external_id, labelled_at=at, **values)


def test_an_imported_label_is_stored_once_and_an_older_one_undoes_nothing(store):
    first = add_label(store, imported("1@5", 5), "import")
    assert first.is_new and first.row["external_id"] == "1@5" and first.row["source"] == "label_studio"
    edited = add_label(store, imported("1@9", 9, label="nv", malignant=False), "import")
    assert edited.row["supersedes"] == first.row["id"]
    again = add_label(store, imported("1@5", 5), "import")
    assert (again.is_new, again.outdated, again.row["id"]) == (False, False, first.row["id"])
    between = add_label(store, imported("1@7", 7), "import")
    assert (between.is_new, between.outdated) == (False, True)
    assert [row["label"] for row in rows(store)] == ["mel", "nv"]
    # Of another place the same name is another label.
    assert add_label(store, malignant("at", source="csv", external_id="1@5", labelled_at=5), "import").is_new
