"""When a retraining is asked for, and that a cause asks once."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from monitoring.retraining_triggers import (
    DAY_US,
    DriftTrigger,
    DriftWindow,
    NewLabelsTrigger,
    RetrainingFacts,
    ScheduleTrigger,
    TriggerRules,
    find_triggers,
)

TODAY = 20_000


def rules(**values):
    return TriggerRules(**{"drift": None, "new_labels": None, "schedule": None} | values)


def days(text, first=TODAY - 9):
    """One window a day, the last one ends now: x drifted, . not."""
    return [DriftWindow((first + i) * DAY_US, (first + i + 1) * DAY_US, letter == "x") for i, letter in enumerate(text)]


def facts(day=TODAY, **values):
    return RetrainingFacts(**{"now": day * DAY_US, "model_version": "3", "dataset_digest": "d" * 64} | values)


DRIFT = rules(drift=DriftTrigger(windows=2, days=3))


@pytest.mark.parametrize(
    ("windows", "triggers"),
    [("........x", False), (".......xx", True), ("......x.x", True), ("xxxxxx...", False), ("xxxxx...x", False)],
)
def test_drift_needs_enough_windows_lately(windows, triggers):
    assert bool(find_triggers(DRIFT, facts(windows=days(windows)))) is triggers


def test_one_drifted_window_is_enough_where_the_rules_say_so():
    (trigger,) = find_triggers(rules(drift=DriftTrigger(windows=1, days=1)), facts(windows=days("........x")))
    assert (trigger.kind, trigger.detail["windows"]) == ("drift", [[(TODAY - 1) * DAY_US, TODAY * DAY_US]])
    assert "1 windows of model 3" in trigger.reason


def test_drift_that_goes_on_is_one_cause_and_drift_that_comes_back_is_another():
    at = [find_triggers(DRIFT, facts(TODAY + i, windows=days(".......xxxx.x"[: 9 + i]))) for i in range(5)]
    assert len({trigger.key for found in at for trigger in found}) == 1 and all(at)
    back = days(".......xx" + "." * 5 + "xx")
    (again,) = find_triggers(DRIFT, facts(TODAY + 7, windows=back))
    assert again.key != at[0][0].key
    (other,) = find_triggers(DRIFT, facts(windows=days(".......xx"), model_version="4"))
    assert other.key != at[0][0].key


def test_windows_after_now_are_not_known_yet():
    assert find_triggers(DRIFT, facts(TODAY - 1, windows=days(".......xx"))) == []


def test_every_batch_of_labels_is_a_cause():
    rule = rules(new_labels=NewLabelsTrigger(count=100))
    keys = [[trigger.key for trigger in find_triggers(rule, facts(new_labels=count))] for count in (99, 100, 199, 200)]
    assert keys[0] == [] and len(keys[1]) == 1 and keys[1] == keys[2] != keys[3]
    (other,) = find_triggers(rule, facts(new_labels=100, dataset_digest="e" * 64))
    assert [other.key] != keys[1]


def test_the_schedule_counts_from_the_last_training_of_whatever_cause():
    rule = rules(schedule=ScheduleTrigger(days=30), cool_down_days=0)
    (first,) = find_triggers(rule, facts())
    assert "never before" in first.reason
    for name in ("last_done", "model_since"):
        assert find_triggers(rule, facts(**{name: (TODAY - 29) * DAY_US})) == []
        (due,) = find_triggers(rule, facts(**{name: (TODAY - 30) * DAY_US}))
        (later,) = find_triggers(rule, facts(TODAY + 20, **{name: (TODAY - 30) * DAY_US}))
        assert due.key == later.key and "30.0 days ago" in due.reason
    assert find_triggers(rule, facts(last_done=(TODAY - 5) * DAY_US, model_since=(TODAY - 60) * DAY_US)) == []


def test_the_cool_down_holds_everything_back_and_ends():
    every = TriggerRules(drift=DriftTrigger(), new_labels=NewLabelsTrigger(), schedule=ScheduleTrigger())
    known = {"windows": days(".......xx"), "new_labels": 500}
    assert [trigger.kind for trigger in find_triggers(every, facts(**known))] == ["drift", "new_labels", "schedule"]
    assert find_triggers(every, facts(last_ended=int((TODAY - 6.9) * DAY_US), **known)) == []
    assert len(find_triggers(every, facts(last_ended=(TODAY - 7) * DAY_US, **known))) == 3


def test_without_a_champion_there_is_nothing_to_train_again():
    assert find_triggers(TriggerRules(), facts(model_version=None, new_labels=10**6)) == []


@pytest.mark.parametrize(
    "bad", [{"drift": {"windows": 0}}, {"schedule": {"days": 0}}, {"cool_down_days": -1}, {"x": 1}]
)
def test_rules_are_checked(bad):
    with pytest.raises(ValidationError):
        TriggerRules(**bad)
