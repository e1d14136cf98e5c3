"""Prometheus sees open alarms, deliveries, drift and labels as the store has them, and no longer what is gone."""

from __future__ import annotations

import pytest

from modeling.bundle import load_bundle
from monitoring.drift_check import Window
from monitoring.model_quality import QualitySettings, window_quality
from serve.drift_logger import open_log
from serve.metrics import (
    ALARM_DELIVERIES,
    ALARMS_UNACKNOWLEDGED,
    DRIFT_ALARM,
    DRIFT_DISTANCE_RATIO,
    DRIFT_EMBEDDING_AUC,
    DRIFT_FEATURES,
    DRIFT_REPORT_AGE_SECONDS,
    LABELS,
    QUALITY,
)
from serve.store_gauges import StoreGauges
from store.alarm_deliveries import Subscription, claim_delivery, give_up
from store.alarm_records import acknowledge_alarm
from store.labels import NewLabel, add_label
from store.tables import now_us
from tests.bundle_factory import served_bundle, storage
from tests.figures import Figures
from tests.log_rows import prediction_row

HOUR_US = 3_600_000_000
DRIFT_METRICS = (DRIFT_REPORT_AGE_SECONDS, DRIFT_ALARM, DRIFT_FEATURES, DRIFT_DISTANCE_RATIO, DRIFT_EMBEDDING_AUC)


class Gauges:
    """The gauges of a store of its own, thirty seconds later at each look."""

    def __init__(self, home):
        self.now = 0.0
        self.store = open_log(storage(home)).store
        self.figures = Figures()
        self.gauges = StoreGauges(open_log(storage(home)), self.figures, lambda: self.now)

    def look(self):
        self.gauges.read()
        self.now += 30

    def value(self, metric, *labels):
        return self.figures.values(metric, *labels)[-1]


@pytest.fixture
def watched(dermray_home):
    return Gauges(dermray_home)


def raise_alarm(store, key, kind="drift", severity="warning", **fields):
    row = {"dedupe_key": key, "kind": kind, "severity": severity, "message": "m", "detail": {}}
    store.raise_alarm({**row, **fields})


def report(store, version, window_end, features=(), embedding=None, drifted=(), watermark=0, **measured):
    key = {"window_start": window_end - 24 * HOUR_US, "window_end": window_end, "model_version": version}
    statistics = {"features": list(features), "embedding": embedding, **measured}
    verdict = {"status": "drift" if drifted else "ok", "alarm": bool(drifted), "drifted": list(drifted)}
    counts = {"num_rows": 9, "num_groups": 9, "input_digest": "d", "report": None}
    key |= {"reference": "r", "label_watermark": watermark}
    store.upsert_drift_report({**key, **verdict, **counts, "statistics": statistics})


def test_open_alarms_are_counted_until_they_are_acknowledged(watched):
    raise_alarm(watched.store, "a", topic="t")
    raise_alarm(watched.store, "quiet", topic="t")
    raise_alarm(watched.store, "b", "missed_cancer", "critical")
    raise_alarm(watched.store, "c", "missed_cancer", "critical")
    watched.look()
    assert watched.value(ALARMS_UNACKNOWLEDGED, "drift", "warning") == 1
    assert watched.value(ALARMS_UNACKNOWLEDGED, "missed_cancer", "critical") == 2
    acknowledge_alarm(watched.store, 1, "rita", None)
    watched.look()
    assert watched.figures.labels(ALARMS_UNACKNOWLEDGED) == {("missed_cancer", "critical")}


def test_deliveries_that_wait_or_failed_are_counted_by_channel(watched):
    raise_alarm(watched.store, "a")
    for channel in ("ops", "chat"):
        delivery = claim_delivery(watched.store, Subscription(channel), HOUR_US, 9, HOUR_US)
    give_up(watched.store, delivery, "answered 500")
    watched.look()
    assert watched.value(ALARM_DELIVERIES, "ops", "pending") == watched.value(ALARM_DELIVERIES, "chat", "failed") == 1


def test_the_newest_window_of_each_model_is_told(watched):
    now = now_us()
    features = [{"distance": 0.3, "threshold": 0.2}, {"distance": 0.1, "threshold": 0.2}]
    report(watched.store, "3", now - 50 * HOUR_US, features, {"auc": 0.9}, ["red", "embedding"])
    report(watched.store, "3", now - 2 * HOUR_US, features[1:], {"auc": 0.52}, watermark=1)
    report(watched.store, "4", now - 26 * HOUR_US, features, {"auc": 0.9}, ["red", "embedding"])
    # Too small a window to judge, and one of a model that went long ago.
    report(watched.store, "5", now - 2 * HOUR_US)
    report(watched.store, "1", now - 24 * 31 * HOUR_US, features, {"auc": 0.9}, ["red"])
    watched.look()
    assert watched.value(DRIFT_REPORT_AGE_SECONDS, "3") == pytest.approx(2 * 3600, abs=60)
    assert watched.value(DRIFT_REPORT_AGE_SECONDS, "4") == pytest.approx(26 * 3600, abs=60)
    told = {version: [watched.figures.values(metric, version) for metric in DRIFT_METRICS[1:]] for version in "345"}
    assert told == {
        "3": [[0], [0], [pytest.approx(0.5)], [0.52]],
        "4": [[1], [2], [pytest.approx(1.5)], [0.9]],
        "5": [[0], [0], [], []],
    }
    assert watched.figures.labels(DRIFT_ALARM) == {("3",), ("4",), ("5",)}


def test_quality_on_labels_is_told_as_check_drift_measured_it(watched, tmp_path):
    bundle = load_bundle(served_bundle(tmp_path / "bundle").bundle_uri)
    settings = QualitySettings(min_malignant=2, min_verified=5)
    now = now_us()
    window = Window("day", now - 24 * HOUR_US, now)
    report(watched.store, "4", now, quality=window_quality(watched.store, bundle, "4", window, settings))
    # Twenty patients: half of their lesions are malignant, and one of these was called negative.
    for number in range(20):
        malignant, flagged = number % 2 == 0, number % 2 == 0 and number > 0
        row = prediction_row(f"p{number}", received_at=now - HOUR_US, model_version="3", patient_hmac=f"{number:064x}")
        row |= {"risk": 0.9 - 0.01 * number if flagged else 0.1 + 0.01 * number, "threshold": 0.5}
        row |= {"band": "high" if flagged else "low", "context": "none"}
        watched.store.insert_predictions([row])
        add_label(watched.store, NewLabel(f"p{number}", "x", malignant, "rita"), "t")
    quality = window_quality(watched.store, bundle, "3", window, settings)
    report(watched.store, "3", now, quality=quality)
    watched.look()
    measured = quality["trailing"]["contexts"]["none"]
    for estimate, figures in (("plain", measured), ("corrected", measured["corrected"])):
        for figure in ("auc", "pauc", "sensitivity", "specificity"):
            told = [watched.value(QUALITY, "3", "none", figure, estimate, bound) for bound in ("low", "value", "high")]
            assert told == [figures[figure][bound] for bound in ("low", "value", "high")]
            assert told == sorted(told)
    assert watched.value(QUALITY, "3", "none", "sensitivity", "plain", "value") == 0.9
    # Nothing is told of a model without labels.
    assert {labels[0] for labels in watched.figures.labels(QUALITY)} == {"3"}


def test_labels_are_counted(watched):
    watched.look()
    assert watched.value(LABELS, "true") == watched.value(LABELS, "false") == 0
    watched.store.insert_predictions([prediction_row("a"), prediction_row("b")])
    for prediction, malignant in (("a", True), ("b", False), ("b", True)):
        add_label(watched.store, NewLabel(prediction, "x", malignant, f"reader {malignant}"), "t")
    watched.look()
    assert (watched.value(LABELS, "true"), watched.value(LABELS, "false")) == (2, 1)


def test_the_store_is_asked_twice_a_minute_and_a_failure_takes_nothing_back(watched, monkeypatch):
    raise_alarm(watched.store, "a")
    watched.look()
    watched.now -= 1
    raise_alarm(watched.store, "b", kind="other")
    watched.gauges.read()
    assert watched.figures.labels(ALARMS_UNACKNOWLEDGED) == {("drift", "warning")}
    watched.now += 1

    def away():
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(watched.gauges._log.store, "reading", away)
        with pytest.raises(OSError, match="away"):
            watched.look()
    assert watched.figures.labels(ALARMS_UNACKNOWLEDGED) == {("drift", "warning")}
    watched.now += 30
    watched.look()
    assert watched.figures.labels(ALARMS_UNACKNOWLEDGED) == {("drift", "warning"), ("other", "warning")}
