"""The HTTP contract: fields, order, errors and idempotency, on the real routes with the other nodes in process."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import cv2
import numpy as np
import pytest

from monitoring.prediction_log import decode_embedding, patient_hmac
from serve.errors import unavailable
from serve.guards import NOTICE_HEADER
from serve.served_model import ServedModel
from serve.settings import IngressSettings, UploadLimits
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    lesion_image,
    lesion_rule,
    served_bundle,
)
from tests.local_service import LocalService

FIELDS = {
    "prediction_id",
    "risk",
    "image_score",
    "class_probabilities",
    "band",
    "threshold",
    "model_version",
    "context",
    "abstained",
    "reasons",
    "stage_ms",
}
LIMITS = UploadLimits(
    max_image_bytes=100_000, max_pixels=250_000, max_batch_images=4, max_batch_bytes=300_000, max_batch_pixels=600_000
)
METADATA = {"age_approx": 60, "sex": "female"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("ingress") / "bundle", version="7")


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


class Served(LocalService):
    """A client of the service, and what stands behind it."""

    def __init__(self, reference, nodes, home):
        super().__init__(reference, home, LIMITS, nodes)

    def predict(self, image=None, key=None, **form):
        headers = {} if key is None else {"Idempotency-Key": key}
        files = {"image": ("lesion.jpg", lesion_image() if image is None else image)}
        return self.client.post("/v1/predict", files=files, data=form, headers=headers)

    def predict_batch(self, images, key=None, **form):
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.client.post(
            "/v1/predict/batch", files=[("images", ("x", image)) for image in images], data=form, headers=headers
        )

    def give_up_after(self, seconds):
        self.service.scoring.settings = IngressSettings(request_timeout_s=seconds)


@pytest.fixture
def served(reference, nodes, dermray_home):
    with_client = Served(reference, nodes, dermray_home)
    with with_client.client:
        yield with_client


def blank_png(size):
    return cv2.imencode(".png", np.zeros((size, size, 3), np.uint8))[1].tobytes()


def problem(response, status, text=""):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"} and "\n" not in body["detail"]
    assert text in body["detail"]
    return body


def test_an_answer_has_the_fields_of_the_contract_and_its_record_is_stored(served):
    response = served.predict(
        metadata=json.dumps(METADATA),
        patient_id="patient 1",
        institution="clinic",
        device="dermatoscope",
        acquired_at="2024-05-01T09:30:00Z",
    )
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == FIELDS
    assert set(answer["stage_ms"]) == {"decode", "score", "fuse", "log", "total"}
    assert answer["context"] == "none" and answer["model_version"] == "7"
    assert answer["abstained"] is False and answer["reasons"] == []
    assert answer["risk"] == pytest.approx(answer["class_probabilities"]["malignant"])
    assert sum(answer["class_probabilities"].values()) == pytest.approx(1)
    (row,) = served.rows()
    for field in FIELDS - {"prediction_id", "stage_ms"}:
        assert row[field] == answer[field], field
    assert row["id"] == answer["prediction_id"]
    assert row["metadata"] == {"age_approx": 60.0, "sex": "female"}
    assert row["patient_hmac"] == patient_hmac("patient 1", b"a test's secret")
    assert (row["institution"], row["device"]) == ("clinic", "dermatoscope")
    assert row["acquired_at"] == 1714555800_000_000
    assert served.log.image_files.get(row["image_hash"], ".jpg")
    assert decode_embedding(row["embedding"]).shape == (64,)
    assert 0 < row["brightness"] < 1 and row["blur"] > -3


def test_without_metadata_the_picture_alone_is_scored(served):
    assert served.predict().json()["context"] == "image_only"
    assert served.predict(metadata="{}").json()["context"] == "image_only"


def test_every_answer_of_a_synthetic_model_says_so(served):
    for response in (served.predict(), served.client.get("/healthz"), served.predict(image=b"no picture")):
        assert "Not a medical device" in response.headers[NOTICE_HEADER]
        assert "synthetic" in response.headers[NOTICE_HEADER]


@pytest.mark.parametrize(
    ("image", "form", "status", "text"),
    [
        (b"hello", {}, 415, "image: not a JPEG, PNG or WebP"),
        (b"", {}, 422, "image: the file is empty"),
        (lesion_image()[:500], {}, 422, "image: "),
        (blank_png(501), {}, 413, "501x501 pixels"),
        (lesion_image() + bytes(100_000), {}, 413, "max_image_bytes"),
        (None, {"metadata": "{"}, 422, "metadata: not valid JSON"),
        (None, {"metadata": "[1]"}, 422, "metadata is [1]"),
        (None, {"metadata": '{"age_approx": 400}'}, 422, "age_approx"),
        (None, {"metadata": '{"lesion_id": "x"}'}, 422, "lesion_id"),
        (None, {"acquired_at": "noon"}, 422, "acquired_at: 'noon'"),
        (None, {"patient_id": "x" * 300}, 422, "patient_id: 300 characters"),
        (None, {"metdata": "{}"}, 422, "metdata: unknown form field"),
    ],
)
def test_a_wrong_request_is_a_4xx_that_names_the_field_and_leaves_no_record(served, image, form, status, text):
    problem(served.predict(image=image, **form), status, text)
    assert served.rows() == []


def test_requests_that_are_no_upload_are_4xx(served):
    client = served.client
    problem(client.post("/v1/predict"), 422, "image: Field required")
    problem(client.post("/v1/predict", data={"image": "text"}), 422, "image: ")
    problem(client.post("/v1/predict", content=b"{}", headers={"content-type": "application/json"}), 422, "image")
    broken = client.post(
        "/v1/predict", content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert broken.status_code in (400, 422) and set(broken.json()) == {"error", "detail"}
    no_boundary = client.post("/v1/predict", content=b"x", headers={"content-type": "multipart/form-data"})
    assert no_boundary.status_code in (400, 422) and set(no_boundary.json()) == {"error", "detail"}
    problem(client.get("/v1/predict"), 405)
    problem(client.get("/v1/nothing"), 404)
    problem(served.predict(key="two words"), 422, "Idempotency-Key")


def test_an_oversize_body_is_refused_by_its_announcement_and_while_it_arrives(served):
    sent = 0

    def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        while sent < 50_000_000:
            sent += 65536
            yield bytes(65536)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    problem(served.client.post("/v1/predict", content=endless(), headers=headers), 413, "request body")
    announced = headers | {"content-length": str(10**12)}
    problem(served.client.post("/v1/predict", content=b"--x--", headers=announced), 413, "request body")
    # A batch may be larger than one image, every other route takes no body to speak of.
    assert served.predict_batch([lesion_image(size=200, suffix=".png")] * 2).status_code == 200
    problem(served.client.post("/healthz", content=b"--x--", headers=announced), 413)


def test_a_batch_keeps_the_order_and_says_per_item_what_is_wrong(served):
    images = [lesion_image(0), b"no picture", lesion_image(2), lesion_image(3)]
    metadata = [METADATA, None, {"age_approx": -5}, None]
    response = served.predict_batch(images, metadata=json.dumps(metadata), patient_id="p")
    assert response.status_code == 200
    answers = response.json()
    assert [set(answer) == FIELDS for answer in answers] == [True, False, False, True]
    assert answers[1]["error"] == "unsupported_media_type" and "image" in answers[1]["detail"]
    assert answers[2]["error"] == "invalid_field" and "age_approx" in answers[2]["detail"]
    assert [answers[0]["context"], answers[3]["context"]] == ["none", "image_only"]
    rows = {row["id"]: row for row in served.rows()}
    assert set(rows) == {answers[0]["prediction_id"], answers[3]["prediction_id"]}
    assert len({row["patient_hmac"] for row in rows.values()}) == 1
    # The same lesions one by one get the same risk.
    assert served.predict(lesion_image(0), metadata=json.dumps(METADATA)).json()["risk"] == answers[0]["risk"]
    assert served.predict(lesion_image(3)).json()["risk"] == answers[3]["risk"]


def test_a_batch_that_is_wrong_as_a_whole_is_refused(served):
    image = lesion_image()
    problem(served.predict_batch([image], metadata="[]"), 422, "metadata: expected a JSON list of 1")
    problem(served.predict_batch([image], metadata="{}"), 422, "metadata: expected a JSON list")
    problem(served.predict_batch([image] * 5), 413, "images: 5 files")
    problem(served.predict_batch([]), 422, "images")
    problem(served.predict_batch([blank_png(450)] * 3), 413, "607500 pixels together")
    # One that is refused for its own size does not count.
    answers = served.predict_batch([blank_png(450), blank_png(450), blank_png(2000), b"text"])
    assert [answer.get("error") for answer in answers.json()] == [
        None,
        None,
        "too_many_pixels",
        "unsupported_media_type",
    ]
    assert len(served.rows()) == 2


def test_a_key_gives_one_answer_and_one_record(served):
    first = served.predict(key="visit-1", metadata=json.dumps(METADATA))
    again = served.predict(key="visit-1", metadata=json.dumps(METADATA))
    assert first.status_code == again.status_code == 200
    without_time = [{name: response.json()[name] for name in FIELDS - {"stage_ms"}} for response in (first, again)]
    assert without_time[0] == without_time[1]
    assert len(served.rows()) == 1
    problem(served.predict(lesion_image(9), key="visit-1", metadata=json.dumps(METADATA)), 422, "Idempotency-Key")
    problem(
        served.predict(key="visit-1"), 422, "Idempotency-Key: this key was used with another metadata; send a new one"
    )
    assert served.predict(key="visit-2").json()["prediction_id"] != first.json()["prediction_id"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("patient_id", "q"), ("institution", "other"), ("device", "other"), ("acquired_at", "2024-05-02T09:30:00Z")],
)
def test_a_key_stands_for_its_origin_too(served, field, value):
    origin = {"patient_id": "p", "institution": "clinic", "device": "camera", "acquired_at": "2024-05-01T09:30:00Z"}
    first = served.predict(key="visit-1", **origin)
    assert served.predict(key="visit-1", **origin).json()["prediction_id"] == first.json()["prediction_id"]
    without = {name: text for name, text in origin.items() if name != field}
    for form in (origin | {field: value}, without):
        problem(served.predict(key="visit-1", **form), 422, f"used with another {field}; send a new one")
    # Also while it is not looked up, and the store alone knows of the first.
    served.sidecar.find = lambda *_: asyncio.sleep(0, [None])
    problem(served.predict(key="visit-1", **without), 422, f"used with another {field}")
    assert len(served.rows()) == 1


def test_a_key_of_a_batch_holds_for_each_item(served):
    images = [lesion_image(0), lesion_image(1)]
    first, again = (served.predict_batch(images, key="round-1").json() for _ in range(2))
    assert [answer["prediction_id"] for answer in first] == [answer["prediction_id"] for answer in again]
    assert len({answer["prediction_id"] for answer in first}) == len(served.rows()) == 2


def test_while_the_store_is_away_answers_are_spooled_and_a_key_stays_one_record(served):
    served.sidecar.down = ConnectionError("gone")
    first = served.predict(key="visit-1")
    again = served.predict(key="visit-1")
    assert first.status_code == again.status_code == 200
    assert first.json()["prediction_id"] == again.json()["prediction_id"]
    assert served.client.get("/readyz").json()["checks"]["log"] == "spooling"
    served.sidecar.down = None
    served.log.replay_spool()
    assert [row["id"] for row in served.rows()] == [first.json()["prediction_id"]]


def test_when_no_disk_takes_the_record_there_is_no_answer(served, dermray_home):
    served.sidecar.down = ConnectionError("gone")
    (dermray_home / "spool").write_text("a file where the folder should be")
    response = served.predict()
    problem(response, 503, "neither the store nor the spool")
    assert int(response.headers["Retry-After"]) >= 1


def test_a_node_that_does_not_answer_gives_503(served, monkeypatch):
    async def hang(images, deadline):
        await asyncio.Event().wait()

    async def full(images, deadline):
        raise unavailable("the queue is full", 2)

    monkeypatch.setattr(served.service.scoring.scorer, "score", full)
    response = served.predict()
    problem(response, 503, "queue is full")
    assert response.headers["Retry-After"] == "2"
    monkeypatch.setattr(served.service.scoring.scorer, "score", hang)
    served.give_up_after(0.3)
    problem(served.predict(), 503, "no answer within 0.3 s")


def test_no_answer_mixes_two_models(served, tmp_path, monkeypatch):
    """While a new model reaches the nodes one after the other, requests wait until all hold the same."""
    other = served_bundle(tmp_path / "other", version="8", onnx_bias=2.0)
    problem_free = served.predict().json()
    served.service.use_model(ServedModel.load(other))
    assert served.client.get("/readyz").status_code == 503
    monkeypatch.setattr("serve.prediction_service._ROLLOUT_TIMEOUT_S", 0.2)
    problem(served.predict(), 503, "new model is being rolled out")
    old = served.service.scoring.scorer, served.service.scoring.fusion
    served.service.scoring.scorer, served.service.scoring.fusion = LocalScorer(other), LocalFusion(other)
    try:
        answer = served.predict().json()
    finally:
        served.service.scoring.scorer, served.service.scoring.fusion = old
    assert (problem_free["model_version"], answer["model_version"]) == ("7", "8")
    assert answer["image_score"] > problem_free["image_score"]


def test_the_model_card_says_what_a_caller_needs(served, reference):
    card = served.client.get("/v1/model").json()
    assert (card["model_version"], card["digest"]) == ("7", reference.sha256)
    assert card["classes"] == ["benign", "malignant"] and card["malignant"] == ["malignant"]
    assert card["metadata_fields"]["age_approx"] == {"kind": "numeric", "minimum": 0.0, "maximum": 120.0}
    assert set(card["contexts"]) == {"image_only", "none"}
    assert card["contexts"]["none"]["thresholds"]["operating_sensitivity"] == 0.95
    assert card["contexts"]["none"]["metrics"]["gate"]["auc"]["value"] == 0.9
    assert card["synthetic"] is True and card["engine"].startswith("onnxruntime")
    assert card["engine_fallback"] is None


def test_health_readiness_and_documentation(served):
    assert served.client.get("/healthz").json()["status"] == "ok"
    ready = served.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ok", "checks": {"image_scorer": "ok", "metadata_fusion": "ok", "log": "ok"}}
    assert served.client.get("/docs").status_code == 200
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/predict", "/v1/predict/batch", "/v1/model", "/healthz", "/readyz"} <= set(paths)
    assert {"/v1/submissions", "/v1/submissions/{submission_id}", "/v1/candidates"} <= set(paths)
    assert {"/v1/retrain", "/v1/retrain/{retrain_id}", "/v1/candidates/{version}/approve"} <= set(paths)


def test_an_unexpected_failure_is_a_json_500_that_quotes_nothing(served, monkeypatch):
    async def fail(images):
        raise RuntimeError("patient Jane")

    monkeypatch.setattr(served.service.scoring.scorer, "score", fail)
    assert "Jane" not in problem(served.predict(), 500)["detail"]


@pytest.fixture(scope="module")
def rule():
    return lesion_rule()


@pytest.fixture(scope="module")
def careful_reference(rule, tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("careful") / "bundle", version="9", abstention=rule)


@pytest.fixture
def careful(careful_reference, dermray_home):
    """A service whose model abstains from pictures unlike `lesion_image`."""
    nodes = LocalScorer(careful_reference), LocalFusion(careful_reference)
    with_client = Served(careful_reference, nodes, dermray_home)
    with with_client.client:
        yield with_client


def test_an_unusable_picture_gets_reasons_and_nothing_a_risk_could_be_read_from_and_is_logged(careful):
    response = careful.predict(blank_png(48), metadata=json.dumps(METADATA))
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == FIELDS
    assert answer["abstained"] is True and {"too_dark", "low_contrast"} <= set(answer["reasons"])
    scores = ("risk", "image_score", "class_probabilities", "band")
    assert {answer[name] for name in scores} == {None}
    (row,) = careful.rows()
    assert row["id"] == answer["prediction_id"] and row["reasons"] == answer["reasons"]
    assert row["abstained"] is True and row["risk"] is None and row["band"] is None
    # For whoever reviews refusals, and for drift: what the network saw.
    assert row["image_score"] is not None and row["brightness"] == 0
    assert careful.log.image_files.get(row["image_hash"], ".png")


def test_a_usable_picture_is_answered_as_by_the_model_without_a_rule(careful, served):
    careful_answer, plain = careful.predict().json(), served.predict().json()
    assert careful_answer["abstained"] is False and careful_answer["reasons"] == []
    assert careful_answer["risk"] == plain["risk"] and careful_answer["band"] == plain["band"]
    assert served.predict(blank_png(48)).json()["abstained"] is False


def test_in_a_batch_only_the_unusable_items_are_abstained_from(careful):
    images = [lesion_image(0), blank_png(48), lesion_image(1)]
    answers = careful.predict_batch(images, key="round").json()
    assert [answer["abstained"] for answer in answers] == [False, True, False]
    assert [answer["risk"] is None for answer in answers] == [False, True, False]
    again = careful.predict_batch(images, key="round").json()
    for first, second in zip(answers, again, strict=True):
        assert first | {"stage_ms": 0} == second | {"stage_ms": 0}


def test_a_picture_unlike_training_is_abstained_from(careful, rule):
    near = dataclasses.replace(rule, max_distance=1e-9)
    careful.service.use_model(dataclasses.replace(careful.service.model, abstention=near))
    assert careful.predict().json()["reasons"] == ["unlike_training"]


def test_the_operator_can_have_everything_scored(careful):
    card = careful.client.get("/v1/model").json()["abstention"]
    assert card["active"] is True and card["false_refusal_rate"] == 0.01
    assert card["limits"]["brightness"]["low"] > 0 and card["max_distance"] > 0
    careful.service.scoring.settings = IngressSettings(abstain=False)
    answer = careful.predict(blank_png(48)).json()
    assert answer["abstained"] is False and answer["risk"] is not None
    assert careful.client.get("/v1/model").json()["abstention"]["active"] is False


def test_a_model_without_a_rule_says_so(served):
    assert served.client.get("/v1/model").json()["abstention"] is None
