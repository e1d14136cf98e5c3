"""One alarm by its id, and how many each quiets. On both databases."""

from __future__ import annotations

from store.alarm_records import acknowledge_alarm, count_repeats, find_alarm
from store.database import open_store

DRIFT = {"kind": "drift", "severity": "warning", "topic": "drift:3", "message": "drift", "model_version": "3"}


def test_an_alarm_tells_how_many_it_quiets_and_is_found_by_its_id(any_store_url):
    store = open_store(any_store_url)
    for number in range(3):
        store.raise_alarm(
            {**DRIFT, "dedupe_key": f"d{number}", "raised_at": 1_000 + number, "detail": {"drifted": ["age"]}}
        )
    store.raise_alarm({**DRIFT, "dedupe_key": "other", "topic": "drift:4", "raised_at": 5_000, "detail": {}})
    first, *_, other = sorted(row["id"] for row in store.alarms())
    assert count_repeats(store, [first, other]) == {first: 2} and count_repeats(store, []) == {}
    acknowledge_alarm(store, first, "Ada", None)
    assert find_alarm(store, first)["acknowledged_by"] == "Ada" and find_alarm(store, other + 1) is None
    store.close()
