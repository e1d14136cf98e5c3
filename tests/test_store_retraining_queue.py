"""Requests to train: one at a time, on both databases, whoever dies; and the facts that triggers are judged by."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import sqlalchemy as sql

from store import audit_chain
from store.candidates import find_candidate, note_origin, record_candidate
from store.database import open_store
from store.labels import NewLabel, add_label
from store.retraining import find_retraining, list_retrainings, open_retrainings, request_retraining
from store.retraining_facts import candidate_since, count_new_labels, drift_windows, last_retrainings
from store.retraining_queue import (
    RetrainTakenOverError,
    begin_stage,
    claim_retraining,
    fail_retraining,
    finish_retraining,
    finish_stage,
    renew_lease,
    retrainings_failed_since,
)
from store.tables import dataset_predictions, now_us, retrain_requests
from tests.log_rows import prediction_row

LEASE = 60_000_000


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def ask(store, key="manual", **values):
    return request_retraining(store, key, "manual", "new camera", "Ada", **values)[0]["id"]


def later(seconds):
    return now_us() + int(seconds * 1e6)


def test_the_oldest_request_is_worked_on_and_the_others_wait(store):
    first, second = ask(store), ask(store, "drift:1")
    claim = claim_retraining(store, LEASE, 3, "job-1")
    assert (claim.id, claim.attempt, claim.requested_by, claim.finished) == (first, 1, "Ada", {})
    row = find_retraining(store, first)
    assert (row["state"], row["attempt"], row["job_id"]) == ("running", 1, "job-1")
    assert claim_retraining(store, LEASE, 3) is None and open_retrainings(store) == 2
    finish_retraining(store, claim)
    assert claim_retraining(store, LEASE, 3).id == second
    assert claim_retraining(open_store(store.engine.url.render_as_string(hide_password=False)), LEASE, 3) is None


def test_a_driver_that_looks_while_another_takes_a_request_gets_none(store):
    ask(store), ask(store, "other")
    with ThreadPoolExecutor(1) as pool:
        second = []

        def look(connection, cursor, statement, *_):
            if statement.startswith("SELECT retrain_requests") and not second:
                second.append(pool.submit(claim_retraining, store, LEASE, 3))
                # Whoever is not kept out has finished by then.
                wait(second, timeout=1)

        sql.event.listen(store.engine, "after_cursor_execute", look)
        first = claim_retraining(store, LEASE, 3)
        assert first is not None and second[0].result(timeout=30) is None
    assert [row["state"] for row in list_retrainings(store, None, 9)].count("running") == 1


def test_who_comes_after_a_lost_driver_goes_on_where_it_was(store):
    ask(store)
    lost = claim_retraining(store, LEASE, 3, "job-1")
    begin_stage(store, lost, "prepare")
    lost = finish_stage(store, lost, "prepare", {"dataset": "x"})
    begin_stage(store, lost, "train")
    ask(store, "other")
    assert claim_retraining(store, LEASE, 3, now=later(59)) is None
    claim = claim_retraining(store, LEASE, 3, "job-2", now=later(61))
    assert (claim.id, claim.attempt, claim.finished) == (lost.id, 2, {"prepare": {"dataset": "x"}})
    assert find_retraining(store, claim.id)["job_id"] == "job-2"
    for late in (
        lambda: renew_lease(store, lost, LEASE),
        lambda: begin_stage(store, lost, "export"),
        lambda: finish_stage(store, lost, "train", {"model_version": "9"}, "9"),
        lambda: fail_retraining(store, lost, "train", "no"),
        lambda: finish_retraining(store, lost),
    ):
        with pytest.raises(RetrainTakenOverError, match="attempt 1 is not the one"):
            late()
    row = find_retraining(store, claim.id)
    assert (row["stage"], row["state"], row["model_version"], row["error"]) == ("train", "running", None, None)
    assert row["detail"]["stages"] == {"prepare": {"dataset": "x"}}


def test_a_renewed_lease_keeps_others_out(store):
    ask(store)
    claim = claim_retraining(store, LEASE, 3)
    renew_lease(store, claim, LEASE, now=later(50))
    assert claim_retraining(store, LEASE, 3, now=later(100)) is None
    assert claim_retraining(store, LEASE, 3, now=later(120)).attempt == 2


def test_a_request_that_loses_every_driver_fails_and_the_next_one_is_taken(store):
    lost, waiting = ask(store), ask(store, "other")
    for attempt in (1, 2):
        claim = claim_retraining(store, 1, 2, now=later(attempt))
        assert (claim.id, claim.attempt) == (lost, attempt)
    begin_stage(store, claim, "train")
    assert claim_retraining(store, LEASE, 2, now=later(9)).id == waiting
    row = find_retraining(store, lost)
    assert (row["state"], row["stage"]) == ("failed", "train") and "2 attempts" in row["error"]
    assert [row["id"] for row in retrainings_failed_since(store, 0)] == [lost]


def test_ends_are_audited_and_errors_are_not_quoted_there(store):
    ask(store)
    claim = claim_retraining(store, LEASE, 3)
    fail_retraining(store, claim, "train", "lesion ISIC_1 of Jane is broken")
    assert find_retraining(store, claim.id)["error"] == "lesion ISIC_1 of Jane is broken"
    ask(store)
    claim = claim_retraining(store, LEASE, 3)
    claim = finish_stage(store, claim, "train", {"model_version": "7"}, "7")
    finish_retraining(store, claim)
    row = find_retraining(store, claim.id)
    assert (row["state"], row["stage"], row["model_version"], row["leased_until"]) == ("done", None, "7", None)
    entries = store.audit_entries()
    assert [entry["action"] for entry in entries] == ["retrain", "retrain_failed", "retrain", "retrain_done"]
    assert entries[1]["detail"] == {"trigger": "manual", "model_version": None, "stage": "train"}
    assert "Jane" not in str(entries) and audit_chain.verify(entries) == 4


def test_a_cause_asks_once_and_again_only_where_it_failed(store):
    ask(store, "drift:3:5", once=True)
    fail_retraining(store, claim_retraining(store, LEASE, 3), "train", "no")
    second = ask(store, "drift:3:5", once=True)
    assert ask(store, "drift:3:5", once=True) == second
    finish_retraining(store, claim_retraining(store, LEASE, 3))
    for _ in range(2):
        row, new = request_retraining(store, "drift:3:5", "drift", "again", "x", once=True)
        assert (row["id"], new) == (second, False)
    # A person may ask as often as they like, which gives the key another name; the cause stays known.
    assert ask(store, "drift:3:5") not in (None, second)
    finish_retraining(store, claim_retraining(store, LEASE, 3))
    assert request_retraining(store, "drift:3:5", "drift", "again", "x", once=True)[1] is False
    assert request_retraining(store, "drift:3:50", "drift", "another", "x", once=True)[1] is True


def test_requests_are_listed_page_by_page_newest_first(store):
    made = [ask(store, f"key {number}") for number in range(5)]
    rows, after = [], None
    while page := list_retrainings(store, after, 2):
        rows += page
        after = (page[-1]["requested_at"], page[-1]["id"])
    assert sorted(row["id"] for row in rows) == sorted(made)
    times = [(row["requested_at"], row["id"]) for row in rows]
    assert times == sorted(times, reverse=True)


def test_the_origin_of_a_candidate_is_noted_for_that_digest_only(store):
    record_candidate(store, "4", "a" * 64, {})
    assert note_origin(store, "4", "b" * 64, None, "Ada", "r") is False
    for _ in range(2):
        assert note_origin(store, "4", "a" * 64, "d" * 64, "Ada", "r") is True
    row = find_candidate(store, "4")
    assert (row["requested_by"], row["dataset_digest"], row["retrain_id"]) == ("Ada", "d" * 64, "r")


def drift(store, start, alarm, watermark=0, model="3"):
    values = {"window_start": start, "window_end": start + 10, "model_version": model, "reference": "r"}
    plain = {"status": "ok", "num_rows": 1, "num_groups": 1, "drifted": [], "statistics": {}, "input_digest": "x"}
    store.upsert_drift_report(values | plain | {"label_watermark": watermark, "alarm": alarm, "report": None})


def test_of_a_window_that_was_judged_again_the_newest_verdict_counts(store):
    drift(store, 100, True)
    drift(store, 100, False, watermark=5)
    drift(store, 200, True)
    drift(store, 300, True)
    drift(store, 200, True, model="4")
    assert drift_windows(store, "3", 310) == [(100, 110, False), (200, 210, True), (300, 310, True)]
    assert drift_windows(store, "3", 309) == [(100, 110, False), (200, 210, True)]


def test_new_labels_are_predictions_that_the_data_set_does_not_hold(store):
    rows = [prediction_row(f"p{number}") for number in range(4)]
    store.insert_predictions(rows)
    for number in (0, 1, 2):
        add_label(store, NewLabel(f"p{number}", "mel", True, "Ada", labelled_at=1000 + number), "Ada")
    add_label(store, NewLabel("p0", "mel", True, "Bob", labelled_at=1000), "Bob")
    assert count_new_labels(store, "d" * 64, 2000, "agreed") == 1
    assert count_new_labels(store, "d" * 64, 2000) == 3
    assert count_new_labels(store, "d" * 64, 1000) == 1
    held = {"prediction_id": "p1", "label_id": 2, "patient_hmac": None}
    with store.writing() as connection:
        for digest in ("d" * 64, "e" * 64):
            connection.execute(sql.insert(dataset_predictions).values(dataset_digest=digest, **held))
    assert count_new_labels(store, "d" * 64, 2000) == 2
    assert count_new_labels(store, "f" * 64, 2000) == 3
    add_label(store, NewLabel("p0", "nv", False, "Bob", labelled_at=1500), "Bob")
    assert [count_new_labels(store, "f" * 64, 2000, need) for need in ("single", "agreed")] == [2, 0]
    add_label(store, NewLabel("p0", "nv", False, "Eve", labelled_at=1500, adjudication=True), "Eve")
    assert [count_new_labels(store, "f" * 64, 2000, need) for need in ("single", "agreed")] == [3, 1]


def test_when_the_last_trainings_ended(store):
    assert last_retrainings(store, later(1)) == (None, None)
    ask(store)
    finish_retraining(store, claim_retraining(store, LEASE, 3))
    done, ended = last_retrainings(store, later(1))
    assert done == ended == find_retraining(store, list_retrainings(store, None, 1)[0]["id"])["finished_at"]
    ask(store)
    fail_retraining(store, claim_retraining(store, LEASE, 3), "train", "no")
    assert last_retrainings(store, later(1))[0] == done < last_retrainings(store, later(1))[1]
    assert last_retrainings(store, done - 1) == (None, None)
    assert candidate_since(store, "4") is None
    record_candidate(store, "4", "a" * 64, {})
    assert done <= candidate_since(store, "4") <= later(0)


@pytest.mark.parametrize("ends", [finish_retraining, lambda store, claim: finish_stage(store, claim, "train", {})])
def test_a_driver_that_is_late_and_the_one_that_takes_over_do_not_wait_for_each_other(postgres_url, ends):
    """Between the lock on the table and the write to the row of who takes over, the late one comes."""
    store = open_store(postgres_url)
    ask(store)
    late = claim_retraining(store, LEASE, 3)
    with ThreadPoolExecutor(1) as pool:
        with store.writing() as connection:
            connection.execute(sql.text("LOCK TABLE retrain_requests IN SHARE ROW EXCLUSIVE MODE"))
            ended = pool.submit(ends, store, late)
            _wait_for_a_blocked_session(store)
            taken = sql.update(retrain_requests).where(retrain_requests.c.id == late.id).values(attempt=2)
            connection.execute(taken)
        with pytest.raises(RetrainTakenOverError):
            ended.result(30)
    assert find_retraining(store, late.id)["attempt"] == 2
    store.close()


def _wait_for_a_blocked_session(store):
    blocked = sql.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    for _ in range(600):
        with store.reading() as connection:
            if connection.execute(blocked).scalar():
                return
        threading.Event().wait(0.05)
    raise AssertionError("nobody waits for the table")
