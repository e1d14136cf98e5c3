"""What repeats an alarm within its cool-down is stored and quiet; what says something new is not. On both databases."""

from __future__ import annotations

import threading

import pytest

from store.alarm_records import acknowledge_alarm, alarms_page
from store.alarm_topics import HOUR_US, insert_alarm, topic_name
from store.audit_chain import verify
from store.database import open_store
from store.tables import now_us

DAY_US = 24 * HOUR_US
START = 1_700_000_000_000_000


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def alarm(key: str, day: float = 0, drifted=("red",), severity="warning", topic: str | None = "drift:3:a", **fields):
    return {
        "dedupe_key": key,
        "kind": "drift",
        "severity": severity,
        "raised_at": START + round(day * DAY_US),
        "message": "m",
        "detail": {"drifted": list(drifted)},
        "topic": topic,
        **fields,
    }


def insert(store, row, cool_down_days: float = 7):
    with store.writing() as connection:
        return insert_alarm(connection, row, round(cool_down_days * DAY_US))


def test_daily_repeats_are_quiet_until_the_cool_down_ends(store):
    rows = [insert(store, alarm(f"day{day}", day)) for day in range(10)]
    first, again = rows[0]["id"], rows[7]["id"]
    assert [row["quieted_by"] for row in rows] == [None, *[first] * 6, None, again, again]


def test_what_says_something_new_is_not_quiet_and_quiets_in_turn(store):
    first = insert(store, alarm("a", 0, ["red"]))
    new = insert(store, alarm("b", 1, ["red", "blur"]))
    assert new["quieted_by"] is None
    # Each of these was told: red and blur by one of the two within the cool-down.
    assert insert(store, alarm("c", 2, ["blur"]))["quieted_by"] == new["id"]
    assert insert(store, alarm("d", 3, ["red"]))["quieted_by"] == new["id"]
    # Red alone was told last by `new`, a week and more after `first`.
    assert insert(store, alarm("e", 7.5, ["red"]))["quieted_by"] == new["id"]
    assert first["quieted_by"] is None


def test_a_quiet_alarm_prolongs_nothing(store):
    insert(store, alarm("a", 0))
    assert insert(store, alarm("b", 6))["quieted_by"] is not None
    assert insert(store, alarm("c", 7.5))["quieted_by"] is None


def test_findings_of_any_kind_of_alarm_count(store):
    insert(store, alarm("a", 0, detail={"findings": ["auc"]}))
    assert insert(store, alarm("b", 1, detail={"findings": ["auc"]}))["quieted_by"] is not None
    assert insert(store, alarm("c", 1, detail={"findings": ["auc", "sensitivity"]}))["quieted_by"] is None


def test_a_higher_severity_is_told_and_a_lower_one_is_not(store):
    low = insert(store, alarm("a", 0, severity="info"))
    high = insert(store, alarm("b", 1, severity="warning"))
    assert (low["quieted_by"], high["quieted_by"]) == (None, None)
    assert insert(store, alarm("c", 2, severity="info"))["quieted_by"] == high["id"]


def test_critical_alarms_and_those_without_a_topic_are_never_quiet(store):
    for key in ("a", "b"):
        assert insert(store, alarm(f"critical {key}", severity="critical"))["quieted_by"] is None
        assert insert(store, alarm(f"none {key}", topic=None))["quieted_by"] is None
    assert insert(store, alarm("other topic", topic="drift:4:a"))["quieted_by"] is None


def test_the_same_alarm_is_raised_once_and_does_not_quiet_itself(store):
    assert insert(store, alarm("a"))["quieted_by"] is None
    assert insert(store, alarm("a", 1)) is None
    assert len(store.alarms()) == 1


def test_without_a_cool_down_nothing_is_quiet(store):
    rows = [insert(store, alarm(key, 0), cool_down_days=0) for key in "abc"]
    assert [row["quieted_by"] for row in rows] == [None] * 3


def test_of_two_raised_at_once_one_is_heard(store):
    """Two checks at a time, on two machines: the second waits for what the first says."""
    later = []
    second = threading.Thread(target=lambda: later.append(insert(store, alarm("b"))))
    with store.writing() as connection:
        first = insert_alarm(connection, alarm("a"))
        second.start()
        # As long as the first is not committed, the second must not be either: it could not see it.
        second.join(1)
        assert second.is_alive()
    second.join(30)
    assert first["quieted_by"] is None and later[0]["quieted_by"] == first["id"]


def test_an_unknown_severity_is_refused(store):
    with pytest.raises(ValueError, match="severity is 'loud'; expected one of info, warning, critical"):
        insert(store, alarm("a", severity="loud"))


def test_acknowledging_an_alarm_acknowledges_what_it_quiets(store):
    first = insert(store, alarm("a", 0))
    insert(store, alarm("b", 1))
    other = insert(store, alarm("c", 1, topic="drift:4:a"))
    seen = acknowledge_alarm(store, first["id"], "rita", "a new camera")
    assert seen["acknowledged_by"] == "rita" and seen["detail"]["acknowledgement"] == "a new camera"
    assert [row["id"] for row in alarms_page(store, True, None, None, 10)] == [other["id"]]
    # One more comes after: a second acknowledgement reaches it, and changes nothing else.
    late = insert(store, alarm("d", 2))
    again = acknowledge_alarm(store, first["id"], "otto", "another")
    assert (again["acknowledged_by"], again["detail"]) == ("rita", seen["detail"])
    by = {row["id"]: row["acknowledged_by"] for row in store.alarms()}
    assert by[late["id"]] == "otto" and by[other["id"]] is None
    entries = [entry for entry in store.audit_entries() if entry["action"] == "acknowledge_alarm"]
    assert [entry["detail"]["quieted"] for entry in entries] == [1, 1]
    acknowledge_alarm(store, first["id"], "otto", None)
    assert verify(store.audit_entries()) == 2


def test_pages_of_quiet_and_of_heard_alarms_hold_each_once(store):
    for day in range(6):
        insert(store, alarm(f"a{day}", day, topic="one"))
        insert(store, alarm(f"b{day}", day, topic=None))

    def ids(quieted, limit):
        found, after = [], None
        while True:
            page = alarms_page(store, False, None, after, limit, quieted)
            found += [row["id"] for row in page]
            if len(page) < limit:
                return found
            after = (page[-1]["raised_at"], page[-1]["id"])

    both = ids(None, 3)
    assert both == sorted(both, reverse=True) and len(both) == 12
    assert sorted(ids(True, 2) + ids(False, 2)) == sorted(both)
    assert len(ids(True, 2)) == 5


def test_names_of_any_length_fit_and_stay_apart():
    long = [topic_name("drift", "institution=" + "x" * 300 + end) for end in "ab"]
    assert max(map(len, long)) <= 255 and long[0] != long[1]
    assert topic_name("drift", "3", "a") == "drift:3:a"


def test_an_alarm_of_now_says_so(store):
    before = now_us()
    row = insert(store, {key: value for key, value in alarm("a").items() if key != "raised_at"})
    assert before <= row["raised_at"] <= now_us()
