"""The queue gives every submission to one worker at a time and loses none, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading

import pytest

from store.database import open_store
from store.submissions import (
    OtherContentError,
    QueueFullError,
    check_submission,
    claim_submissions,
    count_pending,
    erase_submissions,
    find_submission,
    finish_submission,
    images_in_submissions,
    images_of_submissions,
    insert_submission,
    queue_state,
    requeue_submission,
)
from store.tables import now_us

LEASE_US = 60_000_000
SPENT = '{"error": "attempts_exhausted"}'


def image_row(name: str = "h") -> dict:
    return {"hash": name, "suffix": ".jpg", "num_bytes": 3, "stored_at": 1}


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def submit(store, key=None, caller="clinic", max_pending=100, **request):
    content = {"image_hash": "h", "patient_hmac": None, "metadata": {"age_approx": 60.0, "sex": "female"}} | request
    return insert_submission(store, caller, key, content, image_row(content["image_hash"]), max_pending)


def claim(store, limit=10, max_attempts=3, now=None):
    return claim_submissions(store, limit, LEASE_US, max_attempts, SPENT, now)


def test_what_was_submitted_is_claimed_oldest_first_with_what_to_score(store):
    ids = [submit(store, acquired_at=number)[0]["id"] for number in range(4)]
    first = claim(store, limit=3)
    assert sorted(ids[:3]) == sorted(one.id for one in first)
    assert {one.request["acquired_at"] for one in first} == {0, 1, 2}
    assert first[0].request["metadata"] == {"age_approx": 60.0, "sex": "female"}
    assert {(one.caller, one.attempts) for one in first} == {("clinic", 1)}
    assert [one.id for one in claim(store)] == ids[3:] and claim(store) == []
    assert store.image_suffix("h") == ".jpg"


def test_what_is_not_settled_is_counted_by_state(store):
    assert count_pending(store) == {"queued": 0, "running": 0}
    for number in range(4):
        submit(store, acquired_at=number)
    first, second = claim(store, limit=2)
    assert count_pending(store) == {"queued": 2, "running": 2}
    finish_submission(store, first, {"risk": 0.1})
    requeue_submission(store, second, now_us(), SPENT)
    assert count_pending(store) == {"queued": 3, "running": 0}


def test_threads_that_claim_at_once_share_the_queue_and_nothing_twice(store):
    ids = {submit(store)[0]["id"] for _ in range(30)}
    taken, start = [], threading.Barrier(4)

    def worker() -> None:
        start.wait()
        while claimed := claim(store, limit=2):
            taken.extend(one.id for one in claimed)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # On PostgreSQL a worker passes over rows that another is just locking, and may end early; none is taken twice.
    taken += [one.id for one in claim(store, limit=30)]
    assert len(taken) == len(set(taken)) and set(taken) == ids


def test_a_lease_that_ended_is_taken_over_and_its_first_worker_has_no_say_any_more(store):
    submit(store)
    (first,) = claim(store)
    assert claim(store, now=first.leased_until - 1) == []
    (second,) = claim(store, now=first.leased_until)
    assert (second.id, second.attempts) == (first.id, 2) and second.leased_until > first.leased_until
    assert finish_submission(store, first, {"risk": 0.9}) is False
    assert requeue_submission(store, first, 0, "{}") is False
    assert finish_submission(store, second, {"risk": 0.1}) is True
    assert finish_submission(store, second, {"risk": 0.2}) is False
    row = find_submission(store, first.id)
    assert (row["state"], row["result"], row["attempts"]) == ("done", {"risk": 0.1}, 2)
    assert row["finished_at"] >= row["submitted_at"] and row["leased_until"] is None
    assert claim(store, now=now_us() + 10 * LEASE_US) == []


def test_a_failed_attempt_waits_for_its_back_off_and_keeps_its_error(store):
    submit(store)
    (one,) = claim(store)
    later = now_us() + 5_000_000
    assert requeue_submission(store, one, later, '{"error": "unavailable"}') is True
    row = find_submission(store, one.id)
    assert (row["state"], row["error"], row["finished_at"]) == ("queued", '{"error": "unavailable"}', None)
    assert claim(store, now=later - 1) == []
    (again,) = claim(store, now=later)
    assert again.attempts == 2
    finish_submission(store, again, {"risk": 0.5})
    assert find_submission(store, one.id)["error"] is None


def test_a_submission_whose_workers_all_die_is_failed_in_the_end(store):
    submit(store)
    end = 0
    for _ in range(3):
        (one,) = claim(store, now=end or None)
        end = one.leased_until
    assert claim(store, now=end) == []
    row = find_submission(store, one.id)
    assert (row["state"], row["error"], row["attempts"]) == ("failed", SPENT, 3)


def test_a_key_is_one_submission_of_its_caller_and_of_one_content(store):
    first, new = submit(store, key="k")
    again, repeated = submit(store, key="k")
    assert (new, repeated) == (True, False) and again["id"] == first["id"]
    assert submit(store, key="k", caller="other")[0]["id"] != first["id"]
    assert submit(store)[0]["id"] != submit(store)[0]["id"]
    for other in ({"image_hash": "g"}, {"patient_hmac": "p"}, {"metadata": {"age_approx": 61.0, "sex": "female"}}):
        with pytest.raises(OtherContentError):
            submit(store, key="k", **other)
    (one, *_) = claim(store, limit=1)
    finish_submission(store, one, {"risk": 0.1})
    assert submit(store, key="k")[0]["state"] == "done"


def test_one_key_sent_by_many_at_once_is_one_submission(store):
    answers, start = [], threading.Barrier(6)

    def send() -> None:
        start.wait()
        answers.append(submit(store, key="k"))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 6 and len({row["id"] for row, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1


def test_the_queue_is_bounded_by_what_waits_and_a_repeat_is_no_newcomer(store):
    content = submit(store, key="k", max_pending=2)[0]["request"]
    submit(store, max_pending=2)
    with pytest.raises(QueueFullError):
        submit(store, max_pending=2)
    with pytest.raises(QueueFullError):
        check_submission(store, "clinic", None, content, 2)
    assert submit(store, key="k", max_pending=2)[1] is False
    assert check_submission(store, "clinic", "k", content, 2) is not None
    claim(store, limit=1)
    assert submit(store, max_pending=2)[1] is True


def test_erasing_a_patient_takes_their_submissions_in_every_state_and_nobody_elses(store):
    mine = [submit(store, patient_hmac="a", image_hash=name)[0]["id"] for name in ("h1", "h2", "shared")]
    other = submit(store, patient_hmac="b", image_hash="shared")[0]["id"]
    nameless = submit(store)[0]["id"]
    running, done = claim(store, limit=2)
    finish_submission(store, done, {"risk": 0.1})
    with store.writing() as connection:
        hashes = images_of_submissions(connection, "a")
        assert erase_submissions(connection, "a") == 3
        assert images_in_submissions(connection, hashes) == {"shared"}
    assert hashes == {"h1", "h2", "shared"}
    assert [find_submission(store, name) for name in mine] == [None] * 3
    assert finish_submission(store, running, {"risk": 0.1}) is False
    assert {one.id for one in claim(store)} == {other, nameless}


def test_an_erasure_that_is_rolled_back_erased_nothing(store):
    row, _ = submit(store, patient_hmac="a")
    with pytest.raises(RuntimeError), store.writing() as connection:
        erase_submissions(connection, "a")
        raise RuntimeError("the rest of the erasure failed")
    assert find_submission(store, row["id"]) is not None


def test_the_queue_tells_its_oldest_and_what_failed_lately(store):
    assert queue_state(store, 0).oldest_at is None
    rows = [submit(store, acquired_at=number)[0] for number in range(4)]
    first, second = sorted(claim(store, limit=2), key=lambda one: one.request["acquired_at"])
    finish_submission(store, first, None, "the picture is gone")
    state = queue_state(store, 0)
    assert (state.queued, state.running, state.failed) == (2, 1, 1)
    assert state.oldest_at == rows[1]["submitted_at"]
    assert queue_state(store, now_us() + 1).failed == 0
    finish_submission(store, second, {})
    assert queue_state(store, 0).oldest_at == rows[2]["submitted_at"]
