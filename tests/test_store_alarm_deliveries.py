"""A channel gets every alarm it wants, one message at a time, whoever sends and whoever dies. On both databases."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sql

from store import alarm_deliveries
from store.alarm_deliveries import (
    FAILED,
    PENDING,
    SENT,
    SKIPPED,
    Subscription,
    back_off,
    claim_delivery,
    count_deliveries,
    give_up,
    is_due,
    mark_sent,
    next_attempt,
)
from store.alarm_records import acknowledge_alarm, alarms_page
from store.database import open_store
from store.tables import alarms

SECOND = 1_000_000
NOW = 1_700_000_000 * SECOND
LEASE, AGE = 60 * SECOND, 3600 * SECOND
ALL = Subscription("ops")


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def raise_alarms(store, *keys, raised_at=NOW, severity="warning", kind="drift", topic=None):
    for key in keys:
        row = {"dedupe_key": key, "kind": kind, "severity": severity, "raised_at": raised_at, "topic": topic}
        store.raise_alarm({**row, "message": key, "detail": {}})


def claim(store, now=NOW, subscription=ALL, max_attempts=3, gap=0):
    return claim_delivery(store, subscription, LEASE, max_attempts, AGE, gap, now)


def keys(delivery):
    return None if delivery is None else [row["dedupe_key"] for row in delivery.alarms]


def states(store, channel="ops"):
    rows = alarms_page(store, False, None, None, 100)
    return {row["dedupe_key"]: row["deliveries"].get(channel) for row in rows}


def test_all_that_waits_is_one_message_and_is_sent_once(store):
    raise_alarms(store, "a", "b", "c")
    delivery = claim(store)
    assert keys(delivery) == ["a", "b", "c"] and delivery.attempts == 1
    assert claim(store, NOW + SECOND) is None
    assert mark_sent(store, delivery, NOW + SECOND)
    assert not mark_sent(store, delivery, NOW + SECOND)
    assert states(store) == {"a": SENT, "b": SENT, "c": SENT}
    assert claim(store, NOW + AGE) is None


def test_each_channel_gets_its_own(store):
    raise_alarms(store, "a")
    raise_alarms(store, "b", severity="critical", kind="missed_cancer")
    assert keys(claim(store, subscription=Subscription("ops", ("drift",)))) == ["a"]
    assert keys(claim(store, subscription=Subscription("oncall", None, "critical"))) == ["b"]
    assert keys(claim(store, subscription=Subscription("all"))) == ["a", "b"]
    assert states(store, "oncall") == {"a": None, "b": PENDING}


def test_quiet_alarms_are_not_sent(store):
    raise_alarms(store, "a", "b", topic="t")
    assert keys(claim(store)) == ["a"]


def test_one_process_sends_a_message_at_a_time(store):
    raise_alarms(store, *map(str, range(20)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(claim(store))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (delivery,) = filter(None, found)
    assert len(delivery.alarms) == 20 and len(found) == 6


def test_what_its_sender_died_with_is_the_same_message_after_the_lease(store):
    raise_alarms(store, "a", "b")
    first = claim(store)
    raise_alarms(store, "c", raised_at=NOW - 5)
    assert claim(store, NOW + LEASE - 1) is None
    second = claim(store, NOW + LEASE)
    assert keys(second) == ["a", "b"] and second.attempts == 2
    assert second.message_id == first.message_id
    # The first was slow, not dead: what it learnt counts only where it is good news.
    assert not back_off(store, first, NOW, "late")
    assert not give_up(store, first, "late")
    assert mark_sent(store, first, NOW + LEASE)
    assert not back_off(store, second, NOW, "gone")
    third = claim(store, NOW + LEASE)
    assert keys(third) == ["c"] and third.message_id != first.message_id


def test_while_a_receiver_is_away_alarms_gather(store):
    raise_alarms(store, "a")
    delivery = claim(store)
    assert back_off(store, delivery, NOW + 10 * SECOND, "answered 500")
    raise_alarms(store, "b", "c")
    assert not is_due(store, ALL, now=NOW + 9 * SECOND) and claim(store, NOW + 9 * SECOND) is None
    assert next_attempt(store, "ops") == NOW + 10 * SECOND
    assert count_deliveries(store) == {("ops", PENDING): 1}
    again = claim(store, NOW + 10 * SECOND)
    assert keys(again) == ["a"] and again.message_id == delivery.message_id
    mark_sent(store, again, NOW + 11 * SECOND)
    assert keys(claim(store, NOW + 11 * SECOND)) == ["b", "c"]


def test_a_message_is_given_up_and_the_next_one_begins(store):
    raise_alarms(store, "a")
    delivery = claim(store)
    assert give_up(store, delivery, "answered 400")
    raise_alarms(store, "b")
    assert keys(claim(store)) == ["b"]
    assert states(store) == {"a": FAILED, "b": PENDING}
    assert count_deliveries(store) == {("ops", PENDING): 1, ("ops", FAILED): 1}


def test_a_message_whose_senders_die_each_time_is_given_up_too(store):
    raise_alarms(store, "a")
    for attempt in range(3):
        assert claim(store, NOW + attempt * LEASE).attempts == attempt + 1
    assert claim(store, NOW + 3 * LEASE) is None
    assert states(store) == {"a": FAILED}


def test_a_new_channel_gets_no_old_alarms(store):
    raise_alarms(store, "old", raised_at=NOW - AGE)
    raise_alarms(store, "new", raised_at=NOW - AGE + 1)
    assert keys(claim(store)) == ["new"]
    assert states(store) == {"old": SKIPPED, "new": PENDING}
    assert count_deliveries(store) == {("ops", PENDING): 1}


def test_what_waited_too_long_behind_another_message_failed_visibly(store):
    raise_alarms(store, "a")
    delivery = claim(store)
    raise_alarms(store, "b", raised_at=NOW + 1)
    mark_sent(store, delivery, NOW + 2)
    assert claim(store, NOW + AGE + 1) is None
    assert states(store) == {"a": SENT, "b": FAILED}


def test_a_flood_is_spread_over_messages_with_a_gap_between(store):
    raise_alarms(store, "a")
    mark_sent(store, claim(store, gap=60 * SECOND), NOW)
    raise_alarms(store, *(f"flood{index}" for index in range(50)))
    assert claim(store, NOW + 59 * SECOND, gap=60 * SECOND) is None
    assert len(claim(store, NOW + 60 * SECOND, gap=60 * SECOND).alarms) == 50


def test_a_last_message_of_the_future_holds_nothing_up(store):
    """Another machine's clock ran ahead by a day when it said so."""
    raise_alarms(store, "a")
    mark_sent(store, claim(store), NOW + 86_400 * SECOND)
    raise_alarms(store, "b")
    assert keys(claim(store, NOW + SECOND, gap=60 * SECOND)) == ["b"]


def test_more_than_a_message_holds_waits_for_the_next(store, monkeypatch):
    monkeypatch.setattr(alarm_deliveries, "MAX_ALARMS", 2)
    raise_alarms(store, *"abcde")
    found = []
    while (delivery := claim(store)) is not None:
        found.append(keys(delivery))
        mark_sent(store, delivery, NOW)
    assert found == [["a", "b"], ["c", "d"], ["e"]]


def test_a_whole_message_fits_the_databases_limit_of_parameters(store):
    row = {"kind": "drift", "severity": "warning", "raised_at": NOW, "message": "m", "detail": {}}
    with store.writing() as connection:
        rows = [{**row, "dedupe_key": str(index)} for index in range(alarm_deliveries.MAX_ALARMS + 1)]
        connection.execute(sql.insert(alarm_deliveries.alarms), rows)
    delivery = claim(store)
    assert len(delivery.alarms) == alarm_deliveries.MAX_ALARMS
    assert mark_sent(store, delivery, NOW)
    assert len(claim(store).alarms) == 1


def test_looking_for_work_takes_no_write_lock(store, monkeypatch):
    def refuse():
        raise AssertionError("an idle sender wrote")

    monkeypatch.setattr(store, "writing", refuse)
    assert claim(store) is None


def test_a_delivery_whose_alarm_a_retention_removed_is_waited_for_by_nobody(store):
    """The retention's transaction does not see a delivery that a sender takes up at the same moment."""
    raise_alarms(store, "a", "b")
    claim(store)
    with store.writing() as connection:
        connection.execute(sql.delete(alarms).where(alarms.c.dedupe_key == "a"))
    assert count_deliveries(store) == {("ops", PENDING): 1}
    assert next_attempt(store, "ops") == NOW + LEASE
    with store.writing() as connection:
        connection.execute(sql.delete(alarms))
    assert count_deliveries(store) == {} and next_attempt(store, "ops") is None
    assert claim(store, NOW + 2 * LEASE) is None


def test_what_was_given_up_counts_as_open_until_someone_has_seen_the_alarm(store):
    raise_alarms(store, "one", "two")
    give_up(store, claim(store), "gone")
    assert count_deliveries(store, open_only=True) == {("ops", FAILED): 2}
    acknowledge_alarm(store, alarms_page(store, False, None, None, 1)[0]["id"], "Ada", None)
    assert count_deliveries(store, open_only=True) == {("ops", FAILED): 1}
    assert count_deliveries(store) == {("ops", FAILED): 2}
