"""No request makes the service fail or answer what its OpenAPI document does not say: requests made from the document.

Every run makes the same requests. `-m slow` makes six times as many.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections import Counter
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule, run_state_machine_as_test
from schemathesis import Case, GenerationMode, Response

from serve.access import LEAST_ROLE, Caller, is_open
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.settings import ModelReference
from store.api_keys import ROLES, create_api_key, list_api_keys
from store.candidates import record_candidate
from tests.bundle_factory import backend, lesion_image, lesion_rule
from tests.fuzzing import CHECKS, MULTIPART, Known, sent_to
from tests.local_service import LocalService
from tests.tiny_bundle import tiny_bundle

# Requests per route and variant, about by what there is to get wrong.
EXAMPLES = {
    "POST /v1/predict": 60,
    "POST /v1/predict/batch": 60,
    "POST /v1/patients/triage": 50,
    "POST /v1/explain": 40,
    "POST /v1/submissions": 50,
    "GET /v1/submissions/{submission_id}": 30,
    "GET /v1/predictions": 60,
    "GET /v1/predictions/{prediction_id}": 30,
    "GET /v1/predictions/{prediction_id}/image": 30,
    "POST /v1/labels": 60,
    "GET /v1/alarms": 40,
    "POST /v1/alarms/{alarm_id}/acknowledge": 30,
    "GET /v1/monitoring/summary": 20,
    "DELETE /v1/patients/{patient_id}": 20,
    "POST /v1/retrain": 25,
    "GET /v1/retrain": 30,
    "GET /v1/retrain/{retrain_id}": 30,
    "GET /v1/candidates": 5,
    "POST /v1/candidates/{version}/approve": 25,
    "POST /v1/candidates/{version}/reject": 15,
    "POST /v1/champion/rollback": 15,
    "GET /v1/model": 3,
    "GET /healthz": 3,
    "GET /readyz": 3,
}
SLOW_FACTOR = 6
# Of candidates.
VERSIONS = ("4", "5")

# The abstention rule was fitted on the pictures of seeds from 1000 on.
seeds = st.integers(1000, 1005)
patients = st.sampled_from(["1", "a/b", "Ünï ?#%"])
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


class Fuzzed:
    """A service, its document, and keys of each role where it asks for them."""

    def __init__(self, reference: ModelReference, home, with_keys: bool):
        home.mkdir()
        local = LocalService(reference, home)
        self.store = local.log.store
        self.keys: dict[str, str | None] = {"admin": None}
        ring = None
        if with_keys:
            self.keys = {role: create_api_key(self.store, f"the {role}", role, "Ada")[1] for role in ROLES}
            self.keys |= {"nobody": None, "stranger": "drk_" + "x" * 43}
            ring = KeyRing(lambda: list_api_keys(self.store, live_only=True), 300)
        self.with_keys = with_keys
        self.api = build_api(backend(local.service, local.log, keys=ring))
        self.document = schemathesis.openapi.from_asgi("/openapi.json", self.api, config=schemathesis.Config())
        self.known = Known()
        self.register_candidates()
        for version in VERSIONS:
            self.known.add("version", version)
        for version, previous in (("6", None), ("7", "6")):
            self.store.record_approval(version, "Ada", "", "promote", {"previous": previous})
        self.num_sent = 0
        self._send_first_ones()

    def register_candidates(self) -> None:
        """Candidates that nobody has decided about, in place of earlier ones: a rejection is for good."""
        for version in VERSIONS:
            record_candidate(self.store, version, secrets.token_hex(32), {"none": {"auc": {"value": 0.9}}})

    def _send_first_ones(self) -> None:
        """Something of each kind, so that every route has an id to find whichever test runs first."""
        form = {"body": {"image": lesion_image(1000), "patient_id": "1"}, "media_type": MULTIPART}
        for _ in range(2):
            stored = self.call(self.operation("POST /v1/predict").Case(**form)).json()
            label = {"prediction_id": stored["prediction_id"], "label": "malignant"}
            self.call(self.operation("POST /v1/labels").Case(body=label, media_type="application/json"))
        self.call(self.operation("POST /v1/submissions").Case(**form))
        order = {"reason": "new camera"}
        self.call(self.operation("POST /v1/retrain").Case(body=order, media_type="application/json"))
        for path in ("GET /v1/alarms", "GET /v1/predictions"):
            self.call(self.operation(path).Case(query={"limit": 1}))

    def operation(self, label: str):
        method, path = label.split(" ")
        return self.document[path][method]

    def call(self, case: Case, role: str = "admin", **options) -> Response:
        """Sends a case with a role's key, and checks the answer by the document and by the role."""
        key = self.keys[role]
        headers = {"X-API-Key": key or ""} if self.with_keys else {}
        response = case.call(headers=headers | options.pop("headers", {}), **options)
        self.num_sent += 1
        case.validate_response(response, checks=CHECKS)
        self.known.learn(response)
        if self.with_keys:
            self._check_role(case, response)
        return response

    def _check_role(self, case: Case, response: Response) -> None:
        path, status = case.operation.path, response.status_code
        # As sent: some cases leave the header out.
        sent = response.request.headers.get("X-API-Key")
        role = next((role for role in ROLES if self.keys[role] == sent), None)
        if is_open(path):
            assert status not in (401, 403)
        elif role is None:
            assert status == 401
        else:
            assert status != 401 and (status != 403 or role != "admin")
            if status < 400:
                least = LEAST_ROLE[case.method, re.sub(r"\{\w+\}", "{}", path)]
                assert Caller("", role).may(least), f"{case.method} {path} answered {role}, needs {least}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> ModelReference:
    """A model that ranks a patient's lesions and abstains; most risks are below its threshold."""
    directory = tmp_path_factory.mktemp("fuzz") / "bundle"
    contexts = ["image_only", "none", "patient"]
    bundle = tiny_bundle(directory, contexts=contexts, abstention=lesion_rule(), onnx_bias=-6.0, torch_bias=-6.0)
    return ModelReference(bundle_uri=str(directory), sha256=bundle.digest, version="3")


@pytest.fixture(scope="module", params=["open", "keys"])
def fuzzed(request, reference, tmp_path_factory):
    service = Fuzzed(reference, tmp_path_factory.mktemp("fuzzed") / "home", request.param == "keys")
    yield service
    print(f"{request.param}: {service.num_sent} requests")


def send_many(fuzzed: Fuzzed, label: str, number: int) -> Counter[int]:
    """Sends `number` requests to a route, and returns how often each status came."""
    operation, statuses = fuzzed.operation(label), Counter()
    fuzzed.register_candidates()

    @settings(SETTINGS, max_examples=number)
    @given(sent=sent_to(operation, fuzzed.known), role=st.just("admin") | st.sampled_from(list(fuzzed.keys)))
    def send(sent, role):
        case, options = sent
        statuses[fuzzed.call(case, role, **options).status_code] += 1

    send()
    assert any(status < 300 for status in statuses), f"no request was right: {statuses}"
    return statuses


def test_every_route_of_the_document_is_sent_requests(fuzzed):
    assert {result.ok().label for result in fuzzed.document.get_all_operations()} == set(EXAMPLES)


@pytest.mark.parametrize("label", EXAMPLES)
def test_boundary_values_and_other_methods_get_documented_answers(fuzzed, label):
    operation = fuzzed.operation(label)
    config = fuzzed.document.config.generation_for(operation=operation)
    statuses = Counter()
    # Schemathesis tries other methods once for each path, and a path may have two routes.
    fuzzed.document.coverage_unexpected_methods_seen.clear()
    for case in fuzzed.document.iter_coverage_cases(
        operation, generation_modes=list(GenerationMode), generation_config=config
    ):
        statuses[fuzzed.call(case).status_code] += 1
    assert statuses[405] >= 6


@pytest.mark.parametrize("label", EXAMPLES)
def test_no_request_makes_a_route_fail(fuzzed, label):
    assert send_many(fuzzed, label, EXAMPLES[label])


@pytest.mark.slow
@pytest.mark.parametrize("label", EXAMPLES)
def test_no_request_of_many_makes_a_route_fail(fuzzed, label):
    assert send_many(fuzzed, label, SLOW_FACTOR * EXAMPLES[label])


class Lesions(RuleBasedStateMachine):
    """What people do with predictions, in any order, beside a dictionary of what must be there."""

    fuzzed: Fuzzed
    seen: Counter[str]
    machines = itertools.count()
    predictions = Bundle("predictions")
    submissions = Bundle("submissions")

    def __init__(self):
        super().__init__()
        self.prefix = f"machine {next(self.machines)}: "
        # Patient and number of labels, by id.
        self.stored: dict[str, str] = {}
        self.labels: Counter[str] = Counter()
        self.queued: dict[str, str] = {}

    def send(self, label: str, expected: set[int], **fields):
        case = self.fuzzed.operation(label).Case(**fields)
        response = self.fuzzed.call(case)
        assert response.status_code in expected, response.content
        self.seen[f"{label} {response.status_code}"] += 1
        return response

    def form(self, seed: int, patient: str) -> dict:
        return {"body": {"image": lesion_image(seed), "patient_id": self.prefix + patient}, "media_type": MULTIPART}

    @rule(target=predictions, seed=seeds, patient=patients)
    def predict(self, seed, patient):
        answer = self.send("POST /v1/predict", {200}, **self.form(seed, patient)).json()
        self.stored[answer["prediction_id"]] = patient
        return answer["prediction_id"]

    @rule(target=submissions, seed=seeds, patient=patients)
    def submit(self, seed, patient):
        answer = self.send("POST /v1/submissions", {202}, **self.form(seed, patient)).json()
        self.queued[answer["submission_id"]] = patient
        return answer["submission_id"]

    @rule(id_=submissions)
    def see_submission(self, id_):
        expected = {200} if id_ in self.queued else {404}
        self.send("GET /v1/submissions/{submission_id}", expected, path_parameters={"submission_id": id_})

    @rule(id_=predictions)
    def read(self, id_):
        path = {"prediction_id": id_}
        expected = {200} if id_ in self.stored else {404}
        self.send("GET /v1/predictions/{prediction_id}/image", expected, path_parameters=path)
        answer = self.send("GET /v1/predictions/{prediction_id}", expected, path_parameters=path)
        if id_ in self.stored:
            assert len(answer.json()["labels"]) == self.labels[id_]

    @rule(
        id_=predictions,
        label=st.sampled_from(["benign", "malignant"]),
        comment=st.sampled_from([None, "x\ny"]) | st.text(max_size=3),
    )
    def label(self, id_, label, comment):
        body = {"prediction_id": id_, "label": label, "comment": comment}
        fits = comment is None or not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", comment.strip())
        expected = ({200, 201} if id_ in self.stored else {404}) if fits else {422}
        response = self.send("POST /v1/labels", expected, body=body, media_type="application/json")
        self.labels[id_] += response.status_code == 201

    @rule(patient=patients)
    def list_patient(self, patient):
        query = {"patient_id": self.prefix + patient, "limit": 200}
        items = self.send("GET /v1/predictions", {200}, query=query).json()["items"]
        assert {item["prediction_id"] for item in items} == {id_ for id_, of in self.stored.items() if of == patient}

    @rule()
    def acknowledge(self):
        page = self.send("GET /v1/alarms", {200}, query={"unacknowledged": "true", "limit": 200}).json()
        for alarm in page["items"]:
            path = {"path_parameters": {"alarm_id": alarm["id"]}}
            label = "POST /v1/alarms/{alarm_id}/acknowledge"
            first, second = (self.send(label, {200}, **path).json() for _ in range(2))
            assert first["acknowledged_at"] and first == second

    @rule(patient=patients)
    def erase(self, patient):
        path = {"patient_id": quote(self.prefix + patient, safe="")}
        counts = self.send("DELETE /v1/patients/{patient_id}", {200}, path_parameters=path).json()["counts"]
        gone = [id_ for id_, of in self.stored.items() if of == patient]
        assert counts["predictions"] == len(gone)
        for id_ in gone:
            del self.stored[id_]
        self.queued = {id_: of for id_, of in self.queued.items() if of != patient}


def walk(fuzzed: Fuzzed, walks: int) -> None:
    machine = type("Walk", (Lesions,), {"fuzzed": fuzzed, "seen": Counter()})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=walks, stateful_step_count=50))
    erased = "GET /v1/predictions/{prediction_id} 404"
    acknowledged = "POST /v1/alarms/{alarm_id}/acknowledge 200"
    assert machine.seen[erased] and machine.seen[acknowledged] and machine.seen["POST /v1/labels 404"], machine.seen


def test_labels_pictures_alarms_and_erasure_agree_in_any_order(fuzzed):
    walk(fuzzed, 6)


@pytest.mark.slow
def test_labels_pictures_alarms_and_erasure_agree_in_many_orders(fuzzed):
    walk(fuzzed, 30)
