"""What counts as wrong, how urgent it is, and that nothing else is called wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.monitoring_data import OVERDUE_US, Model, StoreState
from serve.monitoring_status import ReplicaState, findings, worst
from store.monitoring_summary import HOUR_US
from store.submissions import QueueState

NOW = 2_000 * HOUR_US
MODEL = Model("3", "d" * 64)
CHECK = {"window_start": NOW - 30 * HOUR_US, "window_end": NOW - 6 * HOUR_US, "alarm": False, "drifted": []}
CHECK |= {"problems": None, "status": "ok"}
REPLICA = ReplicaState({"image_scorer": "ok", "metadata_fusion": "ok", "log": "ok"}, 0, 0)
STORE = StoreState("sqlite", 5, {}, {}, CHECK, False, QueueState(0, 0, None, 0), 100, 10)


def levels(replica=REPLICA, store=STORE) -> list[str]:
    return [finding.level for finding in findings(MODEL, replica, store, NOW)]


def texts(replica=REPLICA, store=STORE) -> str:
    return " ".join(finding.text for finding in findings(MODEL, replica, store, NOW))


def test_nothing_is_wrong_with_a_service_that_is_well():
    assert levels() == [] and worst([]) is None


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"open": {("missed_cancer", "critical"): 2}}, "critical", "2 critical alarms are open: missed cancer"),
        (
            {"open": {("drift", "warning"): 1, ("quality", "warning"): 1}},
            "warning",
            "2 warnings are open: drift, quality",
        ),
        ({"undelivered": {"chat": 3}}, "warning", "Channel chat did not take 3 open alarms"),
        ({"check": None, "checkable": True}, "warning", "nobody looked for drift"),
        (
            {"check": CHECK | {"window_end": NOW - OVERDUE_US - 1}},
            "warning",
            "overdue: the last window ended 36 hours ago",
        ),
        ({"check": CHECK | {"alarm": True, "drifted": list("abcdefg")}}, "warning", "a, b, c, d, e and others"),
        ({"check": CHECK | {"problems": ["AUC fell"]}}, "warning", "worse than it was: AUC fell"),
        ({"queue": QueueState(1, 0, NOW - HOUR_US, 0)}, "warning", "has waited for 60 minutes"),
        ({"queue": QueueState(0, 0, None, 2)}, "warning", "2 submissions failed"),
        ({"answers": 100, "abstained": 21}, "warning", "no risk for 21 %"),
    ],
)
def test_what_the_store_tells_is_wrong(change, level, words):
    store = replace(STORE, **change)
    assert levels(store=store) == [level] and words in texts(store=store)


@pytest.mark.parametrize(
    "change",
    [
        {"open": {("drift", "info"): 5}},
        {"check": None},
        {"check": CHECK | {"status": "insufficient", "window_end": NOW - OVERDUE_US}},
        {"queue": QueueState(5, 5, NOW - HOUR_US // 4, 0)},
        # Of so few lesions a fifth says nothing.
        {"answers": 10, "abstained": 9},
        {"answers": 0, "abstained": 0},
    ],
)
def test_what_is_usual_is_not_called_wrong(change):
    assert levels(store=replace(STORE, **change)) == []


def test_what_the_replica_knows_is_told_while_the_store_is_away():
    replica = ReplicaState({"image_scorer": "another model", "log": "spooling"}, 3, 1)
    assert levels(replica, None) == ["critical"] * 3 + ["warning"] * 2
    assert "The store does not answer" in findings(MODEL, replica, None, NOW)[0].text
    for words in (
        "the image scorer says: another model",
        "3 batches of predictions wait",
        "1 batch of predictions could",
    ):
        assert words in texts(replica, None)
    assert levels(ReplicaState(None, 0, 0)) == ["critical"]


def test_the_most_urgent_comes_first():
    store = replace(STORE, open={("drift", "warning"): 1, ("missed_cancer", "critical"): 1}, undelivered={"chat": 1})
    found = findings(MODEL, replace(REPLICA, spooled=1), store, NOW)
    assert [finding.level for finding in found] == ["critical", "warning", "warning", "warning"]
    assert worst(found) == "critical"
