"""A drifted window raises one alarm, in the store and in the log."""

from __future__ import annotations

import logging

from monitoring.alarms import drift_alarm, raise_alarm
from monitoring.drift_report import WindowDrift
from store.database import open_store

VERDICT = WindowDrift("drift", 180, 50, ["red", "embedding"])


def alarm(start: int = 0, version: str = "3", reference: str = "a" * 64, verdict: WindowDrift = VERDICT):
    return drift_alarm("2026-11-21", start, start + 10, version, reference, verdict)


def test_one_alarm_per_window_model_and_reference(tmp_path, caplog):
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    with caplog.at_level(logging.WARNING):
        assert raise_alarm(store, alarm()) is True
        # More rows came in, and more features moved: the operator knows already.
        assert raise_alarm(store, alarm(verdict=WindowDrift("drift", 190, 51, ["red", "blur"]))) is False
    assert len(caplog.records) == 1
    for other in (alarm(start=10), alarm(version="4"), alarm(reference="b" * 64)):
        assert raise_alarm(store, other) is True
    assert len(store.alarms()) == 4


def test_the_message_says_when_what_and_whose():
    row = alarm()
    assert row["message"] == "drift on 2026-11-21: red, embedding (180 predictions of model 3)"
    assert row["detail"]["drifted"] == ["red", "embedding"]
