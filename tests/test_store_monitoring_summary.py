"""The summary counts what is in its window, hour by hour, and nothing else."""

from __future__ import annotations

import pytest
import sqlalchemy as sql

from store.database import open_store
from store.monitoring_summary import HOUR_US, answered_before, count_answers, monitoring_summary
from store.shadow_records import shadow_id
from store.tables import labels
from tests.log_rows import label_row, prediction_row

END = 1_000 * HOUR_US + 77


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def at(hours_ago: float) -> int:
    return END - int(hours_ago * HOUR_US)


def test_an_empty_store_has_an_empty_summary(store):
    summary = monitoring_summary(store, END, 3)
    assert summary["predictions"] == summary["abstained"] == summary["labels"] == summary["missed_cancers"] == 0
    assert summary["total_ms"] is None and summary["drift"] == [] and summary["unacknowledged_alarms"] == {}
    assert [entry["start_us"] for entry in summary["per_hour"]] == [at(3), at(2), at(1)]
    assert summary["shadow"] == []


def test_records_are_counted_by_hour_band_version_and_reason(store):
    refused = {"abstained": True}
    store.insert_predictions(
        [
            prediction_row("before", received_at=at(3) - 1, band="low"),
            prediction_row("first", received_at=at(3), band="low", stage_ms={"total": 10.0}),
            prediction_row("second", received_at=at(2) - 1, band="high", model_version="2", stage_ms={"total": 20.0}),
            prediction_row("third", received_at=END - 1, reasons=["blurred", "too_dark"], **refused),
            prediction_row("fourth", received_at=at(0.5), reasons=["blurred"], **refused),
            prediction_row("fifth", received_at=at(0.5), band="low", stage_ms={"total": 60.0}),
            prediction_row("after", received_at=END, band="low"),
            prediction_row(shadow_id("fifth"), received_at=at(1), role="shadow", band="low"),
        ]
    )
    summary = monitoring_summary(store, END, 3)
    assert (summary["predictions"], summary["abstained"]) == (5, 2)
    assert summary["by_band"] == {"low": 2, "high": 1} and summary["by_model_version"] == {"1": 4, "2": 1}
    assert summary["abstention_reasons"] == {"blurred": 2, "too_dark": 1}
    assert [(entry["predictions"], entry["abstained"]) for entry in summary["per_hour"]] == [(2, 0), (0, 0), (3, 2)]
    assert summary["total_ms"] == {"mean": 30.0, "median": 20.0, "p95": pytest.approx(56.0), "p99": pytest.approx(59.2)}


def test_the_latest_drift_report_of_each_model_is_shown(store):
    def report(model, end, **values):
        base = {
            "window_start": end - 5,
            "window_end": end,
            "model_version": model,
            "reference": "r",
            "label_watermark": 0,
            "status": "ok",
            "num_rows": 9,
            "num_groups": 9,
            "alarm": False,
            "drifted": [],
            "statistics": {},
            "input_digest": "d",
            "report": None,
        }
        store.upsert_drift_report(base | values)

    report("1", 20, status="drift", alarm=True, drifted=["red"])
    report("1", 10)
    report("2", 15)
    first, second = monitoring_summary(store, END, 1)["drift"]
    assert (first["model_version"], first["window_end"], first["status"]) == ("1", 20, "drift")
    assert first["alarm"] is True and first["drifted"] == ["red"]
    assert (second["model_version"], second["window_end"]) == ("2", 15)


def test_labels_and_alarms_are_counted(store):
    store.insert_predictions([prediction_row("a")])
    with store.writing() as connection:
        connection.execute(sql.insert(labels), [label_row("a", labelled_at=time) for time in (at(2), at(0.5), END)])
    alarm = {"severity": "critical", "message": "m", "detail": {}}
    for key, kind, raised in (("1", "missed_cancer", at(5)), ("2", "missed_cancer", at(1)), ("3", "drift", at(1))):
        store.raise_alarm({**alarm, "dedupe_key": key, "kind": kind, "raised_at": raised})
    summary = monitoring_summary(store, END, 1)
    assert summary["labels"] == 1 and summary["missed_cancers"] == 1
    assert summary["unacknowledged_alarms"] == {"missed_cancer": 2, "drift": 1}


def test_shadows_of_the_window_are_compared_with_the_champion(store):
    def pair(name, received_at, shadow_version="2"):
        values = {"received_at": received_at, "risk": 0.25, "threshold": 0.5}
        shadow = values | {"role": "shadow", "model_version": shadow_version, "risk": 0.75}
        return [prediction_row(name, **values), prediction_row(shadow_id(name), **shadow)]

    inside = [pair("a", at(1)), pair("b", at(0.5)), pair("c", at(0.5), "3")]
    outside = [pair("before", at(1) - 1), pair("after", END)]
    store.insert_predictions([row for both in inside + outside for row in both])
    summary = monitoring_summary(store, END, 1)
    first, second = summary["shadow"]
    assert summary["predictions"] == 3
    assert (first["champion_version"], first["shadow_version"], first["pairs"]) == ("1", "2", 2)
    assert (first["mean_abs_difference"], first["raised"], first["lowered"]) == (0.5, 1.0, 0.0)
    assert (second["shadow_version"], second["pairs"]) == ("3", 1)


def test_answers_of_a_while_are_counted_with_those_without_a_risk(store):
    assert count_answers(store, at(1), END) == (0, 0)
    store.insert_predictions(
        [
            prediction_row("before", received_at=at(1) - 1),
            prediction_row("first", received_at=at(1)),
            prediction_row("refused", received_at=at(0.5), abstained=True, reasons=["blurred"]),
            prediction_row("shadow", received_at=at(0.5), role="shadow"),
        ]
    )
    assert count_answers(store, at(1), END) == (2, 1)


def test_a_model_has_answered_before_a_moment_or_it_is_new(store):
    store.insert_predictions(
        [
            prediction_row("old", received_at=at(5), model_version="1"),
            prediction_row("older", received_at=at(6), model_version="2"),
            prediction_row("new", received_at=at(1), model_version="3"),
        ]
    )
    assert [answered_before(store, version, at(2)) for version in "123"] == [True, True, False]
    assert not answered_before(store, "2", at(2), limit=1)
