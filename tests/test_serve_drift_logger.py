"""The sidecar commits entries together, lets no bad one take its neighbours along, and answers a key only once."""

from __future__ import annotations

import pytest

from monitoring.prediction_log import PredictionRecord
from serve.drift_logger import DriftLoggerLogic, LogEntry, open_log
from store.database import StoreUnavailableError
from store.image_files import prepare_image
from tests.bundle_factory import lesion_image, storage


def entry(index: int, key: str | None = None, **fields) -> LogEntry:
    image = prepare_image(lesion_image(index))
    fields = {"model_version": "1", "context": "none", "image_hash": image.hash, "idempotency_key": key} | fields
    return LogEntry((PredictionRecord(**fields),), {image.hash: image.data})


@pytest.fixture
def log(dermray_home):
    return open_log(storage(dermray_home))


def test_all_entries_of_a_call_share_one_transaction(log, monkeypatch):
    calls = []
    insert = log.store.insert_predictions
    monkeypatch.setattr(
        log.store, "insert_predictions", lambda rows, images=(): calls.append(rows) or insert(rows, images)
    )
    assert DriftLoggerLogic(log).commit([entry(index) for index in range(5)]) == [None] * 5
    assert [len(rows) for rows in calls] == [5]
    assert len(list(log.store.predictions_between(0, 2**62))) == 5


def test_an_entry_that_the_store_refuses_fails_alone(log):
    good, other = entry(0), entry(1)
    image = prepare_image(lesion_image(2))
    bad = LogEntry(entry(2).records, {"0" * 64: image.data})
    results = DriftLoggerLogic(log).commit([good, bad, other])
    assert results[0] is None and results[2] is None
    assert isinstance(results[1], ValueError)
    stored = {row["id"] for row in log.store.predictions_between(0, 2**62)}
    assert stored == {good.records[0].id, other.records[0].id}


def test_an_unavailable_store_fails_the_whole_call_which_may_be_made_again(log, monkeypatch):
    logic, entries = DriftLoggerLogic(log), [entry(0), entry(1)]
    with monkeypatch.context() as patch:

        def down(*_):
            raise StoreUnavailableError("locked")

        patch.setattr(log.store, "insert_predictions", down)
        with pytest.raises(StoreUnavailableError):
            logic.commit(entries)
    logic.commit(entries)
    logic.commit(entries)
    assert len(list(log.store.predictions_between(0, 2**62))) == 2


def test_the_second_request_under_a_key_gets_the_first_ones_record(log):
    logic = DriftLoggerLogic(log)
    first, second = entry(0, "visit-1", risk=0.25), entry(0, "visit-1", risk=0.26)
    assert logic.commit([first]) == [first.records]
    (ack,) = logic.commit([second])
    assert ack == first.records
    assert logic.find("anonymous", ["visit-1", "visit-2"]) == [first.records[0], None]
    assert logic.find("someone else", ["visit-1"]) == [None]
    assert logic.ping()
