"""Asking for a training and approving a candidate, on the real routes and both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sql
from fastapi import FastAPI
from starlette.testclient import TestClient

from monitoring.prediction_log import PredictionLog
from serve.access import Caller
from serve.candidate_routes import add_candidate_routes
from serve.http_errors import add_error_handlers
from serve.model_decisions import ModelDecisions
from serve.retrain_routes import add_retrain_routes
from store import audit_chain
from store.candidates import mark_candidate, open_approval, record_candidate, requesters
from store.champions import open_rollback
from store.retraining_queue import claim_retraining, fail_retraining
from store.tables import candidates, retrain_requests

DIGEST, OTHER = "a" * 64, "b" * 64
GATE = {"none": {"auc": {"value": 0.91, "low": 0.88, "high": 0.93}}}


class Routes:
    """A client that calls as `caller`, and the store behind the routes."""

    def __init__(self, url, tmp_path):
        self.log = PredictionLog(url, str(tmp_path / "images"), str(tmp_path / "spool"))
        api = FastAPI()
        add_error_handlers(api)
        add_retrain_routes(api, self.log, 2)
        add_candidate_routes(api, ModelDecisions(self.log, 2))
        self.caller = Caller("Ada", "approver")

        async def with_caller(scope, receive, send):
            await api({**scope, "dermray.caller": self.caller}, receive, send)

        self.client = TestClient(with_caller, raise_server_exceptions=False)

    def end(self, request_id: str, state: str) -> None:
        """What the job does at its end."""
        with self.log.store.writing() as connection:
            mine = retrain_requests.c.id == request_id
            connection.execute(sql.update(retrain_requests).where(mine).values(state=state, finished_at=5))

    def retrain(self, **body):
        return self.client.post("/v1/retrain", json={"reason": "new camera"} | body)

    def approve(self, version="4", reason="fewer missed melanomas"):
        return self.client.post(f"/v1/candidates/{version}/approve", json={"reason": reason})


@pytest.fixture
def routes(any_store_url, tmp_path):
    made = Routes(any_store_url, tmp_path)
    yield made
    made.log.store.close()


def problem(response, status, text=""):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "detail"} and text in response.json()["detail"]


def test_a_request_is_recorded_with_who_asked_and_why(routes):
    response = routes.retrain()
    assert response.status_code == 202
    answer = response.json()
    assert response.headers["Location"] == answer["status_url"] == f"/v1/retrain/{answer['retrain_id']}"
    found = routes.client.get(answer["status_url"]).json()
    assert (found["state"], found["trigger"], found["reason"]) == ("requested", "manual", "new camera")
    assert (found["requested_by"], found["attempt"], found["finished_at"]) == ("Ada", 0, None)
    (entry,) = routes.log.store.audit_entries()
    assert (entry["actor"], entry["subject"]) == ("Ada", f"retrain/{answer['retrain_id']}")
    assert entry["detail"] == {"trigger": "manual", "reason": "new camera"}


@pytest.mark.parametrize("ended", ["done", "failed"])
def test_one_request_per_trigger_is_open_at_a_time(routes, ended):
    first = routes.retrain().json()["retrain_id"]
    again = routes.retrain(reason="asked twice")
    assert (again.status_code, again.json()["retrain_id"]) == (200, first)
    other = routes.retrain(trigger="drift")
    assert other.status_code == 202 and other.json()["retrain_id"] != first
    routes.end(first, "running")
    assert routes.retrain().json()["retrain_id"] == first
    routes.end(first, ended)
    second = routes.retrain()
    assert second.status_code == 202 and second.json()["retrain_id"] != first
    assert routes.client.get(f"/v1/retrain/{first}").json()["state"] == ended
    assert routes.retrain().json()["retrain_id"] == second.json()["retrain_id"]
    assert audit_chain.verify(routes.log.store.audit_entries()) == 3


def test_many_who_ask_at_once_open_one_request(routes):
    routes.end(routes.retrain().json()["retrain_id"], "done")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: routes.retrain(), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [202]
    assert len({answer.json()["retrain_id"] for answer in answers}) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"reason": ""}',
        b'{"reason": "   "}',
        b'{"reason": 7}',
        b'{"reason": NaN}',
        b'{"reason": null}',
        b'{"reason": "a\\u0000b"}',
        b'{"reason": "\\ud800"}',
        b'{"reason": "\xff"}',
        b'{"reason": "x", "trigger": "whim"}',
        b'{"reason": "x", "trigger": ' + b"9" * 5000 + b"}",
        b'{"reason": "x", "other": 1}',
        b'{"reason": "x", "\\ud800": 1}',
        b'{"reason": ' + b"[" * 100_000 + b"}",
        b'{"reason": "' + b"x" * 1001 + b'"}',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_wrong_bodies_are_4xx_and_leave_nothing(routes, body):
    record_candidate(routes.log.store, "4", DIGEST, GATE)
    for path in ("/v1/retrain", "/v1/candidates/4/approve"):
        response = routes.client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422), (path, response.status_code, response.text)
        assert set(response.json()) == {"error", "detail"}
    assert routes.log.store.audit_entries() == []


def test_requests_are_listed_with_stage_and_error(routes):
    assert routes.client.get("/v1/retrain").json() == {"items": [], "next_cursor": None}
    ids = []
    for trigger in ("manual", "drift", "schedule"):
        ids.append(routes.retrain(trigger=trigger).json()["retrain_id"])
    claim = claim_retraining(routes.log.store, 60_000_000, 3, "retrain-2026-11-21-1")
    fail_retraining(routes.log.store, claim, "train", "no lesions")
    found = routes.client.get(f"/v1/retrain/{claim.id}").json()
    assert (found["state"], found["stage"], found["error"]) == ("failed", "train", "no lesions")
    assert (found["attempt"], found["job_id"]) == (1, "retrain-2026-11-21-1")
    listed, cursor = [], {}
    while cursor is not None:
        page = routes.client.get("/v1/retrain", params={"limit": 2, **cursor}).json()
        listed += page["items"]
        cursor = page["next_cursor"] and {"cursor": page["next_cursor"]}
    assert [row["retrain_id"] for row in listed] == ids[::-1] and found in listed


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "cursor=", "cursor=WzEsMl0", "cursor=%00", "x=1"])
def test_wrong_pages_are_422(routes, query):
    problem(routes.client.get(f"/v1/retrain?{query}"), 422)


@pytest.mark.parametrize("name", ["0" * 32, "x", "%00", "%ff", "9" * 4000])
def test_unknown_names_are_404(routes, name):
    problem(routes.client.get(f"/v1/retrain/{name}"), 404, "no such request")
    problem(routes.approve(name), 404, "no such candidate")


def test_candidates_are_listed_newest_first_with_what_the_gate_split_said(routes):
    assert routes.client.get("/v1/candidates").json() == []
    for version in ("3", "4"):
        assert record_candidate(routes.log.store, version, DIGEST, GATE) is True
    assert record_candidate(routes.log.store, "4", DIGEST, {}) is False
    listed = routes.client.get("/v1/candidates").json()
    assert [row["model_version"] for row in listed] == ["4", "3"]
    assert listed[0]["gate_metrics"] == GATE and listed[0]["digest"] == DIGEST
    assert (listed[0]["state"], listed[0]["approvals"]) == ("candidate", [])


def test_an_approval_is_on_record_once_per_person(routes):
    record_candidate(routes.log.store, "4", DIGEST, GATE)
    response = routes.approve()
    assert response.status_code == 200
    assert {name: response.json()[name] for name in ("model_version", "approver", "reason")} == {
        "model_version": "4",
        "approver": "Ada",
        "reason": "fewer missed melanomas",
    }
    assert routes.approve(reason="clicked twice").json() == response.json()
    routes.caller = Caller("Bob", "approver")
    routes.approve(reason="me too")
    (listed,) = routes.client.get("/v1/candidates").json()
    assert [row["approver"] for row in listed["approvals"]] == ["Ada", "Bob"]
    store = routes.log.store
    assert [(row["decision"], row["model_version"]) for row in store.approvals()] == [("approve", "4")] * 2
    assert [(entry["actor"], entry["action"]) for entry in store.audit_entries()] == [
        ("Ada", "approve"),
        ("Bob", "approve"),
    ]


@pytest.mark.parametrize("state", ["promoted", "rejected"])
def test_what_was_decided_cannot_be_approved(routes, state):
    record_candidate(routes.log.store, "4", DIGEST, GATE)
    assert mark_candidate(routes.log.store, "4", DIGEST, state) is True
    problem(routes.approve(), 409, f"candidate 4 is {state} already")
    assert routes.log.store.approvals() == []


@pytest.mark.parametrize("through", ["requested_by", "retrain_id"])
def test_who_asked_for_a_training_cannot_approve_what_came_of_it(routes, through):
    request_id = routes.retrain().json()["retrain_id"]
    store = routes.log.store
    record_candidate(store, "4", DIGEST, GATE)
    with store.writing() as connection:
        value = {"requested_by": "Ada", "retrain_id": request_id}[through]
        connection.execute(sql.update(candidates).values({through: value}))
    before = len(store.audit_entries())
    for name in ("Ada", "ADA ", "Ada"):
        routes.caller = Caller(name, "approver")
        problem(routes.approve(), 409, "asked for candidate 4; expected another person's approval")
    assert store.approvals() == []
    refused = [(entry["actor"], entry["action"], entry["detail"]) for entry in store.audit_entries()[before:]]
    expected = {"digest": DIGEST, "requested_by": ["Ada"]}
    assert refused == [(name, "approval_refused", expected) for name in ("Ada", "ADA ", "Ada")]
    routes.approve()
    assert len(store.audit_entries()) == before + 3  # the same attempt again is the same refusal
    routes.caller = Caller("Bob", "approver")
    assert routes.approve().json()["approver"] == "Bob"
    assert open_approval(store, "4", DIGEST, ["Bob"]) is None
    assert open_approval(store, "4", DIGEST, ["Ada"])["approver"] == "Bob"
    audit_chain.verify(store.audit_entries())


def test_another_registrys_candidate_has_other_requesters(routes):
    store = routes.log.store
    record_candidate(store, "4", DIGEST, GATE)
    with store.writing() as connection:
        connection.execute(sql.update(candidates).values(requested_by="Ada"))
    assert requesters(store, "4", DIGEST) == ["Ada"]
    assert requesters(store, "4", OTHER) == requesters(store, "5", DIGEST) == []


def test_a_version_of_another_registry_inherits_nothing(routes):
    store = routes.log.store
    record_candidate(store, "4", DIGEST, GATE)
    routes.approve()
    mark_candidate(store, "4", DIGEST, "promoted")
    assert record_candidate(store, "4", OTHER, GATE) is True
    (listed,) = routes.client.get("/v1/candidates").json()
    assert (listed["digest"], listed["state"], listed["approvals"]) == (OTHER, "candidate", [])
    assert open_approval(store, "4", OTHER) is None
    assert mark_candidate(store, "4", DIGEST, "rejected") is False


def test_a_promotion_uses_an_approval_up(routes):
    store = routes.log.store
    assert open_approval(store, "4", DIGEST) is None
    record_candidate(store, "4", DIGEST, GATE)
    routes.approve()
    assert open_approval(store, "4", DIGEST)["approver"] == "Ada"
    store.record_approval("4", "Ada", "fewer missed melanomas", "promote")
    assert open_approval(store, "4", DIGEST) is None


def test_a_rejection_is_on_record_and_final(routes):
    record_candidate(routes.log.store, "4", DIGEST, GATE)
    routes.approve()
    response = routes.client.post("/v1/candidates/4/reject", json={"reason": "takes scars for melanomas"})
    assert response.status_code == 200
    told = {name: response.json()[name] for name in ("model_version", "rejected_by", "reason")}
    assert told == {"model_version": "4", "rejected_by": "Ada", "reason": "takes scars for melanomas"}
    again = routes.client.post("/v1/candidates/4/reject", json={"reason": "twice"})
    for refused in (again, routes.approve()):
        problem(refused, 409, "candidate 4 is rejected already")
    problem(routes.client.post("/v1/candidates/5/reject", json={"reason": "x"}), 404, "no such candidate")
    assert [row["decision"] for row in routes.log.store.approvals()] == ["reject", "approve"]


def test_a_rollback_waits_for_its_job_in_the_name_of_who_asked_first(routes):
    store, order = routes.log.store, {"model_version": "4", "reason": "misses on site 4"}
    problem(
        routes.client.post("/v1/champion/rollback", json=order), 409, "version 4 is not the champion, there is none"
    )
    for version, previous in (("3", None), ("4", "3")):
        store.record_approval(version, "Ada", "", "promote", {"previous": previous})
    response = routes.client.post("/v1/champion/rollback", json=order)
    assert response.status_code == 202
    told = {name: response.json()[name] for name in ("model_version", "asked_by", "reason")}
    assert told == {"model_version": "4", "asked_by": "Ada", "reason": "misses on site 4"}
    routes.caller = Caller("Bob", "approver")
    assert routes.client.post("/v1/champion/rollback", json=order).json() == response.json()
    assert open_rollback(store)["approver"] == "Ada"


def test_a_store_that_does_not_answer_gives_503(tmp_path):
    routes = Routes("postgresql://nobody@127.0.0.1:1/none", tmp_path)
    for response in (
        routes.retrain(),
        routes.client.get(f"/v1/retrain/{'0' * 32}"),
        routes.client.get("/v1/retrain"),
        routes.client.get("/v1/candidates"),
        routes.approve(),
    ):
        problem(response, 503, "store does not answer")
        assert response.headers["Retry-After"] == "2"
