"""The page /models: what people see of candidates before they decide, and that their decisions are on record."""

from __future__ import annotations

import html
import re

import pytest
from starlette.testclient import TestClient

from monitoring.gate_rules import GateRules, ShadowRules
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.rule_words import rule_words
from store.api_keys import create_api_key, list_api_keys
from store.candidates import find_candidate, mark_candidate, record_candidate
from store.champions import open_rollback
from store.refusals import record_refusal
from tests.bundle_factory import backend
from tests.local_service import LocalService
from tests.model_facts import CANDIDATE, a_candidate_and_a_champion

HOSTILE = "<script>window.hacked=1</script>"


class Clinic:
    """A service with keys; `page` and `decide` come from whoever signed in."""

    def __init__(self, local: LocalService):
        self.local, self.store = local, local.log.store
        people = {"Ada": "approver", "Ben": "approver", "Dr Weber": "approver", "Rita": "reviewer"}
        keys = {name: create_api_key(self.store, name, role, "test")[1] for name, role in people.items()}
        ring = KeyRing(lambda: list_api_keys(self.store, live_only=True), refresh_s=300)
        api = build_api(backend(local.service, local.log, keys=ring))
        self.clients = {}
        for name, key in keys.items():
            client = TestClient(api, raise_server_exceptions=False, follow_redirects=False)
            token = _token(client.get("/sign-in").text)
            assert client.post("/sign-in", data={"csrf_token": token, "key": key}).status_code == 303
            self.clients[name] = client

    def page(self, name="Ada", status=200) -> str:
        answer = self.clients[name].get("/models")
        assert answer.status_code == status
        return re.sub(r"\s+", " ", answer.text)

    def decide(self, path: str, name="Ada", reason="sees the new camera", **fields):
        client = self.clients[name]
        form = {"csrf_token": _token(client.get("/about").text), "reason": reason, **fields}
        return client.post(f"/models/{path}", data=form)

    def decisions(self) -> list[tuple[str, str, str, str]]:
        rows = reversed(self.store.approvals())
        return [(row["decision"], row["model_version"], row["approver"], row["reason"]) for row in rows][2:]


def _token(page: str) -> str:
    return re.search(r'name="csrf_token" value="([^"]+)"', page)[1]


def text_of(page: str) -> str:
    """What a person reads, on one line."""
    joined = re.sub(r"</?(strong|bdi|q|code|time|a|span)( [^>]*)?>", "", page)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", joined)))


@pytest.fixture
def clinic(reference, nodes, tmp_path):
    made = Clinic(LocalService(reference, tmp_path, nodes=nodes))
    yield made
    made.store.close()


def test_a_candidate_stands_beside_the_champion(clinic):
    a_candidate_and_a_champion(clinic.store)
    shown = text_of(clinic.page())
    assert "Version 3 answers, the champion since" in shown and "by Dr Adams: version 3 sees more" in shown
    assert "The gate passes it: all 2 rules hold." in shown
    # AUC of each on its own gate split, and the difference on the same lesions.
    assert "AUC 0.930 0.890 to 0.970 0.900 0.860 to 0.940 +0.030 +0.011 to +0.050" in shown
    assert "cancers that only the candidate finds: 6, that only the champion finds: 2" in shown
    assert "in 1 of 2 fewer than version 3" in shown and "skin tone dark fewer 300 30 0.800 0.950" in shown
    assert "Engines on amd-epyc: onnxruntime-cpu-1" in shown and "refused: differs by 0.031 of probability" in shown
    assert "6.10 ms at 1, 4.25 ms at 8" in shown


def test_the_rule_that_failed_comes_first(clinic):
    a_candidate_and_a_champion(clinic.store, passed=False)
    shown = text_of(clinic.page())
    assert "The gate refuses it: 1 of 2 rules failed." in shown
    assert (
        "Cancers found, loss against the champion, with metadata: 0.0695, required at most 0 0.9565 → 0.8870" in shown
    )
    table = shown[shown.index("All 2 rules") :]
    assert table.index("max_sensitivity_drop") < table.index("min_auc")


def test_an_approval_is_on_record_in_the_name_of_who_signed_in(clinic):
    a_candidate_and_a_champion(clinic.store)
    answer = clinic.decide("4/approve")
    assert (answer.status_code, answer.headers["location"]) == (303, "/models#model-4")
    assert clinic.decisions() == [("approve", "4", "Ada", "sees the new camera")]
    assert "Approve version 4" not in clinic.page() and "Approve version 4" in clinic.page("Ben")
    assert "Ada approved it on" in text_of(clinic.page("Ben"))


def test_who_asked_for_the_training_cannot_approve_it(clinic):
    a_candidate_and_a_champion(clinic.store)
    shown = clinic.page("Dr Weber")
    assert "another person has to approve it" in shown and "Approve version 4" not in shown
    refused = clinic.decide("4/approve", "Dr Weber")
    assert refused.status_code == 409 and "expected another person&#39;s approval" in refused.text
    assert clinic.decisions() == []
    assert "could not approve: asked for its training" in clinic.page()


def test_a_rejection_is_for_good(clinic):
    a_candidate_and_a_champion(clinic.store)
    clinic.decide("4/approve")
    assert clinic.decide("4/reject", "Ben", "takes scars for melanomas").status_code == 303
    assert clinic.decisions()[-1] == ("reject", "4", "Ben", "takes scars for melanomas")
    assert find_candidate(clinic.store, "4")["state"] == "rejected"
    assert clinic.decide("4/approve", "Ben").status_code == 409
    shown = text_of(clinic.page())
    assert "No candidate waits for a decision." in shown and "takes scars for melanomas" in shown


def test_going_back_is_asked_for_once_and_said_until_it_is_done(clinic):
    a_candidate_and_a_champion(clinic.store)
    assert "Go back to version 2" in clinic.page()
    for name in ("Ada", "Ben"):
        assert clinic.decide("rollback", name, "misses on site 4", model_version="3").status_code == 303
    assert clinic.decisions() == [("ask_rollback", "3", "Ada", "misses on site 4")]
    shown = clinic.page()
    assert "python -m ray_jobs.apply_decisions" in shown and "Go back to version 2" not in shown
    clinic.store.record_approval("2", "Ada", "misses on site 4", "rollback", {"previous": "3"})
    mark_candidate(clinic.store, "3", "c" * 64, "rejected")
    assert open_rollback(clinic.store) is None
    shown = text_of(clinic.page())
    # The service still runs version 3 here.
    assert "Version 3 answers. The champion is version 2: the service was not swapped yet." in shown
    refused = clinic.decide("rollback", model_version="3")
    assert refused.status_code == 409 and "version 3 is not the champion, version 2 is" in refused.text


@pytest.mark.parametrize("reason", ["", "   ", "x" * 1001, "a\x00b"])
@pytest.mark.parametrize("path", ["4/approve", "4/reject", "rollback"])
def test_a_decision_needs_a_reason(clinic, path, reason):
    a_candidate_and_a_champion(clinic.store)
    answer = clinic.decide(path, reason=reason, model_version="3")
    assert answer.status_code == 422 and "expected 1 to 1000 characters of plain text" in answer.text
    assert clinic.decisions() == [] and find_candidate(clinic.store, "4")["state"] == "candidate"


@pytest.mark.parametrize("path", ["4/approve", "4/reject", "rollback"])
def test_reviewers_and_other_sites_decide_nothing(clinic, path):
    a_candidate_and_a_champion(clinic.store)
    assert clinic.decide(path, "Rita", model_version="3").status_code == 403
    form = {"csrf_token": _token(clinic.clients["Ben"].get("/about").text), "reason": "x", "model_version": "3"}
    assert clinic.clients["Ada"].post(f"/models/{path}", data=form).status_code == 403
    assert clinic.decisions() == []
    clinic.page("Rita", status=403)


@pytest.mark.parametrize("version", ["9", "..%2f..", "a%20b", "x" * 65])
def test_a_model_that_is_no_candidate_is_404(clinic, version):
    assert clinic.decide(f"{version}/approve").status_code == 404


def test_older_versions_are_shown_when_asked_for_and_decided_ones_take_no_decision(clinic):
    a_candidate_and_a_champion(clinic.store)
    for version in "56789":
        record_candidate(clinic.store, version, version * 64, {})
    shown = clinic.page()
    assert "Candidate: version 9" in shown and "Candidate: version 5" not in shown
    page = clinic.clients["Ada"]
    assert "Candidate: version 5" in page.get("/models?version=5").text
    decided = page.get("/models?version=2").text
    assert "Once champion: version 2" in decided and "/models/2/approve" not in decided
    assert page.get("/models?version=<b>").status_code == 200


def test_differences_from_an_earlier_champion_are_not_shown_beside_todays(clinic):
    a_candidate_and_a_champion(clinic.store)
    assert "+0.030" in clinic.page()
    clinic.store.record_approval("2", "Ada", "misses on site 4", "rollback", {"previous": "3"})
    shown = text_of(clinic.page())
    assert "+0.030" not in shown and "that only the champion finds" not in shown
    assert "Version 2 is the champion by now: the gate will judge it again beside that one." in shown


def test_a_rollback_that_could_not_be_done_says_why(clinic):
    a_candidate_and_a_champion(clinic.store)
    record_refusal(clinic.store, "Ada", "rollback_refused", "model/3", {"reason": "bundle of version 2 is gone"})
    shown = text_of(clinic.page())
    assert "could not go back from it Ada bundle of version 2 is gone" in shown


def test_what_people_wrote_is_text(clinic):
    a_candidate_and_a_champion(clinic.store, requested_by=HOSTILE)
    clinic.decide("4/approve", reason=HOSTILE)
    clinic.decide("rollback", reason=HOSTILE, model_version="3")
    shown = clinic.page()
    assert HOSTILE not in shown and shown.count("&lt;script&gt;window.hacked=1") >= 4


def test_a_model_that_no_job_told_of_shows_what_its_bundle_says(clinic):
    """A service whose bundle was deployed by its folder: no registry, no promotion."""
    shown = text_of(clinic.page())
    assert "Version 3 answers. No promotion is on record." in shown and "In service: version 3" in shown
    card = clinic.clients["Ada"].get("/v1/model").json()
    auc = card["contexts"]["none"]["metrics"]["gate"]["auc"]["value"]
    assert f"AUC {auc:.3f}" in shown and "Nobody has decided anything yet." in shown


def test_a_candidate_that_was_never_judged_says_so(clinic):
    a_candidate_and_a_champion(clinic.store)
    with clinic.store.writing() as connection:
        connection.exec_driver_sql(f"DELETE FROM model_facts WHERE digest = '{CANDIDATE}'")
    shown = text_of(clinic.page())
    assert "The gate has not judged it yet." in shown and "Its figures are not in the store." in shown


def test_every_rule_of_the_gate_has_words():
    not_limits = {"contexts", "interval_from", "shadow", "required", "days"}
    names = [name for name in GateRules.model_fields if name not in not_limits]
    names += [f"shadow.{name}" for name in ShadowRules.model_fields if name not in not_limits]
    assert [name for name in names if rule_words(name) == name] == []
