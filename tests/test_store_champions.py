"""Who is the champion by what people decided, and what is still to be done, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sql

from store import audit_chain
from store.candidates import (
    DecidedError,
    approve_candidate,
    find_candidate,
    find_rejection,
    open_approval,
    record_candidate,
    reject_candidate,
)
from store.champions import (
    NotChampionError,
    ask_rollback,
    champion_on_record,
    decisions,
    note_deployed,
    open_approvals,
    open_rollback,
    record_move,
    unfinished,
)
from store.database import open_store
from store.model_facts import find_model_facts, record_model_facts
from store.refusals import record_refusal
from store.tables import candidates

DIGESTS = {version: version * 64 for version in "1234"}


@pytest.fixture
def store(any_store_url):
    made = open_store(any_store_url)
    yield made
    made.close()


def candidate(store, version, requested_by=None):
    record_candidate(store, version, DIGESTS[version], {"none": {"auc": {"value": 0.9}}}, requested_by=requested_by)
    return find_candidate(store, version)


def move(store, decision, version, previous, deploy=False):
    """What promote_model records."""
    gate = {"previous": previous, "registry_event": f"{decision}{version}", "deploy": deploy}
    store.record_approval(version, "Ada", "", decision, gate)


def test_the_champion_and_the_one_before_it_follow_promotions_and_rollbacks(store):
    assert champion_on_record(store) is None
    steps = [("promote", "1", None), ("promote", "2", "1"), ("promote", "3", "2"), ("rollback", "2", "3")]
    expected = [("1", None), ("2", "1"), ("3", "2"), ("2", "1")]
    # Going back twice goes back by two promotions; the version that was left is no champion before another.
    steps += [("rollback", "1", "2"), ("promote", "4", "1")]
    expected += [("1", None), ("4", "1")]
    for step, champion in zip(steps, expected, strict=True):
        move(store, *step)
        assert champion_on_record(store)[:2] == champion


def test_a_rollback_is_asked_for_once_and_open_until_it_is_done(store):
    for step in (("promote", "1", None), ("promote", "2", "1")):
        move(store, *step)
    asked = ask_rollback(store, "2", "Cleo", "misses on site 4")
    assert ask_rollback(store, "2", "Dora", "me too") == asked == open_rollback(store)
    assert (asked["model_version"], asked["approver"], asked["reason"]) == ("2", "Cleo", "misses on site 4")
    move(store, "rollback", "1", "2")
    assert open_rollback(store) is None
    with pytest.raises(NotChampionError, match="version 2 is not the champion, version 1 is"):
        ask_rollback(store, "2", "Cleo", "again")
    with pytest.raises(NotChampionError, match="version 1 has no champion before it to go back to"):
        ask_rollback(store, "1", "Cleo", "again")
    audit_chain.verify(store.audit_entries())


def test_two_jobs_that_record_the_same_move_record_it_once(store):
    def record(_):
        return record_move(store, "promote", "1", "Ada", "good", {"registry_event": "1@now", "previous": None})

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(record, range(6))) == 1
    assert len(store.approvals()) == len(store.audit_entries()) == 1
    assert record_move(store, "promote", "1", "Ada", "good", {"registry_event": "3@later", "previous": "2"})


def test_nobody_goes_back_from_a_champion_that_is_not_on_record(store):
    with pytest.raises(NotChampionError, match="version 1 is not the champion, there is none"):
        ask_rollback(store, "1", "Cleo", "misses")


def test_many_who_ask_at_once_ask_for_one_rollback(store):
    for step in (("promote", "1", None), ("promote", "2", "1")):
        move(store, *step)
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(lambda number: ask_rollback(store, "2", f"person {number}", "misses"), range(8)))
    assert len({row["id"] for row in rows}) == 1
    assert [row["decision"] for row in store.approvals()].count("ask_rollback") == 1


@pytest.mark.parametrize("round_number", range(3))
def test_of_an_approval_and_a_rejection_at_once_the_rejection_stands(store, round_number):
    made = candidate(store, "1")

    def approve(number):
        try:
            return approve_candidate(store, made, f"person {number}", "good")
        except DecidedError as error:
            return error.state

    with ThreadPoolExecutor(6) as threads:
        approving = [threads.submit(approve, number) for number in range(5)]
        rejection = threads.submit(reject_candidate, store, made, "Bob", "scars").result()
        outcomes = [found.result() for found in approving]
    # Whoever came after the rejection was told so, and nobody's approval counts.
    assert all(outcome == "rejected" or outcome["id"] < rejection["id"] for outcome in outcomes)
    assert find_candidate(store, "1")["state"] == "rejected"
    assert find_rejection(store, "1", DIGESTS["1"])["approver"] == "Bob"
    assert open_approvals(store, 100) == []


def test_a_rejection_is_of_one_bundle(store):
    reject_candidate(store, candidate(store, "1"), "Bob", "scars")
    with pytest.raises(DecidedError, match="rejected"):
        approve_candidate(store, find_candidate(store, "1"), "Ada", "good")
    assert find_rejection(store, "1", DIGESTS["2"]) is None and find_rejection(store, "2", DIGESTS["1"]) is None


def test_approvals_wait_until_a_promotion_uses_them(store):
    for version in "123":
        candidate(store, version, requested_by="Bob")
    approve_candidate(store, find_candidate(store, "2"), "Ada", "good")
    approve_candidate(store, find_candidate(store, "1"), "Ada", "better")
    approve_candidate(store, find_candidate(store, "3"), "Bob", "mine")  # asked for it: does not count
    assert [row["model_version"] for row in open_approvals(store, 100)] == ["2", "1"]
    move(store, "promote", "1", None)
    assert [row["model_version"] for row in open_approvals(store, 100)] == ["2"]
    assert open_approval(store, "1", DIGESTS["1"]) is None


def test_what_was_cut_off_is_known_until_it_is_finished(store):
    assert unfinished(store) is None
    made = candidate(store, "1")
    gate = {"previous": None, "registry_event": "1@now", "bundle_digest": made["digest"], "deploy": True}
    store.record_approval("1", "Ada", "", "promote", gate)
    assert unfinished(store)["model_version"] == "1"  # not marked
    with store.writing() as connection:
        connection.execute(sql.update(candidates).values(state="promoted"))
    assert unfinished(store)["model_version"] == "1"  # not deployed
    for _ in range(2):
        note_deployed(store, "1", "1@now")
    assert unfinished(store) is None
    assert [row["action"] for row in decisions(store, 10)] == ["deployed", "promote"]
    move(store, "promote", "2", "1", deploy=False)
    assert unfinished(store) is None  # nobody wanted it deployed


def test_decisions_are_newest_first_with_the_refused_ones(store):
    made = candidate(store, "1")
    approve_candidate(store, made, "Ada", "good")
    record_refusal(store, "Ada", "promotion_refused", "model/1", {"results": []})
    store.append_audit("Ada", "retrain", "retrain/1", {})
    store.append_audit("Ada", "promote", "modelling/1", {})
    move(store, "promote", "1", None)
    found = [(row["action"], row["model_version"], row["person"], row["reason"]) for row in decisions(store, 10)]
    assert found == [
        ("promote", "1", "Ada", ""),
        ("promotion_refused", "1", "Ada", ""),
        ("approve", "1", "Ada", "good"),
    ]
    assert len(decisions(store, 2)) == 2


def test_facts_of_a_model_are_replaced_by_name(store):
    assert record_model_facts(store, "a" * 64, "report", {"none": {"auc": 1}, "patient": {"auc": 2}})
    assert not record_model_facts(store, "a" * 64, "report", {"none": {"auc": 1}})
    assert record_model_facts(store, "a" * 64, "report", {"none": {"auc": 3}})
    record_model_facts(store, "a" * 64, "engines", {"cpu": {"chosen": {}}})
    record_model_facts(store, "a" * 64, "gate", {"": {"passed": True}})
    record_model_facts(store, "b" * 64, "report", {"none": {"auc": 4}})
    found = find_model_facts(store, {"a" * 64, "c" * 64})
    assert found["a" * 64].report == {"none": {"auc": 3}, "patient": {"auc": 2}}
    assert found["a" * 64].engines == {"cpu": {"chosen": {}}} and found["a" * 64].gate == {"passed": True}
    assert found["c" * 64] == ({}, {}, None, None) and set(found) == {"a" * 64, "c" * 64}
