"""The windows of one model in their order, each with its newest verdict. On both databases."""

from __future__ import annotations

import pytest

from store.database import open_store
from store.drift_history import drift_history, find_drift_report

DAY = 86_400_000_000
FEATURE = {"name": "age", "statistic": "ks_distance", "distance": 0.1, "threshold": 0.2}


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def report(store, day: int, watermark: int = 0, model: str = "3", reference: str = "r", **values) -> None:
    statistics = {
        "features": [FEATURE | {"distance": day / 10}],
        "embedding": None,
        "segments": [{"by": "device"}] * 100,
    }
    row = {"window_start": day * DAY, "window_end": (day + 1) * DAY, "label_watermark": watermark}
    row |= {"model_version": model, "reference": reference, "status": "ok", "alarm": False, "drifted": []}
    row |= {"num_rows": 9, "num_groups": 9, "statistics": statistics, "input_digest": "d", "report": None}
    store.upsert_drift_report(row | values)


def days(rows) -> list[int]:
    return [row["window_start"] // DAY for row in rows]


def test_the_newest_windows_come_oldest_first_and_other_models_are_left_out(store):
    assert drift_history(store, "3", "r", 30) == []
    for day in (4, 1, 3, 2):
        report(store, day)
    report(store, 5, model="2", reference="other")
    found = drift_history(store, "3", "r", 3)
    assert days(found) == [2, 3, 4]
    assert [row["features"][0]["distance"] for row in found] == [0.2, 0.3, 0.4]


def test_a_window_that_was_judged_again_counts_once_with_its_newest_verdict(store):
    report(store, 1, 7, status="drift", alarm=True, drifted=["age"])
    report(store, 1, 3)
    report(store, 2)
    found = drift_history(store, "3", "r", 30)
    assert [(row["status"], row["alarm"], row["drifted"]) for row in found] == [
        ("drift", True, ["age"]),
        ("ok", False, []),
    ]


def test_a_check_by_the_bundle_is_this_model_s_too(store):
    report(store, 1, model="bundle:r", reference="r")
    report(store, 2, model="3", reference="r")
    assert days(drift_history(store, "3", "r", 30)) == [1, 2]


def test_statistics_that_are_not_there_are_none(store):
    report(store, 1, status="insufficient", statistics={})
    report(store, 2, statistics={"embedding": {"auc": 0.6}, "quality": {"problems": ["AUC fell"]}})
    first, second = drift_history(store, "3", "r", 30)
    assert (first["features"], first["embedding"], first["problems"]) == (None, None, None)
    assert (second["features"], second["embedding"], second["problems"]) == (None, {"auc": 0.6}, ["AUC fell"])


def test_a_report_is_found_as_a_whole(store):
    report(store, 1)
    (row,) = drift_history(store, "3", "r", 1)
    assert len(find_drift_report(store, row["id"])["statistics"]["segments"]) == 100
    assert find_drift_report(store, row["id"] + 1) is None
