"""A patient's lesions are judged together: ranks follow the risks, what nobody judged comes first."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modeling.bundle import load_bundle
from serve.lesion import Origin, prepare
from serve.prediction_routes import parse_lesions
from serve.settings import UploadLimits
from store.tables import now_us
from tests.bundle_factory import LocalFusion, LocalScorer, blank_image, lesion_image, lesion_rule
from tests.local_service import LocalService
from tests.test_serve_ingress import Served, problem
from tests.tiny_bundle import SIZE, tiny_bundle

RECORDS = [{"age_approx": 60, "sex": "male"}, {"age_approx": 61}, None, {"sex": "female"}]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from serve.settings import ModelReference

    directory = tmp_path_factory.mktemp("triage") / "bundle"
    bundle = tiny_bundle(directory, contexts=["image_only", "none", "patient"], abstention=lesion_rule())
    return ModelReference(bundle_uri=str(directory), sha256=bundle.digest, version="7")


@pytest.fixture
def served(reference, dermray_home):
    with_client = Served(reference, (LocalScorer(reference), LocalFusion(reference)), dermray_home)
    with with_client.client:
        yield with_client


def triage(served, images, key=None, patient_id="patient 1", **form):
    headers = {} if key is None else {"Idempotency-Key": key}
    files = [("images", ("x", image)) for image in images]
    return served.client.post(
        "/v1/patients/triage", files=files, data={"patient_id": patient_id, **form}, headers=headers
    )


def ranking(answer):
    return [(lesion["prediction_id"], lesion["rank"], lesion["risk"]) for lesion in answer["lesions"]]


def pictures(number):
    return [lesion_image(seed) for seed in range(2000, 2000 + number)]


def test_every_lesion_is_compared_with_the_others_and_ranked_by_its_risk(served, reference):
    images = pictures(4)
    answer = triage(served, images, metadata=json.dumps(RECORDS)).json()
    assert (answer["context"], answer["model_version"], answer["refused"]) == ("patient", "7", [])
    bundle = load_bundle(reference.bundle_uri)
    pixels = np.stack([prepare(image, SIZE, UploadLimits()).pixels for image in images])
    scores = LocalScorer(reference).logic.score(pixels)
    columns = {name: [(record or {}).get(name) for record in RECORDS] for name in bundle.task.columns}
    expected = bundle.contexts["patient"].predict(scores.log_probabilities, columns, ["p"] * 4)[:, 1]
    for lesion in answer["lesions"]:
        assert lesion["risk"] == pytest.approx(expected[lesion["index"]])
        assert lesion["context"] == "patient"
        assert lesion["rank"] == 1 + int((expected > expected[lesion["index"]] + 1e-12).sum())
    assert [lesion["rank"] for lesion in answer["lesions"]] == sorted(lesion["rank"] for lesion in answer["lesions"])
    assert sorted(lesion["index"] for lesion in answer["lesions"]) == [0, 1, 2, 3]
    rows = {row["id"]: row for row in served.rows()}
    assert {lesion["prediction_id"] for lesion in answer["lesions"]} == set(rows)
    assert {row["context"] for row in rows.values()} == {"patient"}
    assert len({row["patient_hmac"] for row in rows.values()} - {None}) == 1


class StandsOut:
    """A patient model whose risk is how far a lesion is from the mean of the patient's trusted ones."""

    def __init__(self, model):
        self.thresholds = model.thresholds

    def predict(self, log_probabilities, columns, groups, trusted):
        assert len(set(groups)) == 1 and len(groups) == len(log_probabilities) == len(trusted)
        score = np.exp(log_probabilities[:, 1])
        risk = np.abs(score - score[trusted].mean())
        return np.stack([1 - risk, risk], axis=1)


def test_lesions_are_compared_with_those_that_the_model_would_score_itself(served, monkeypatch):
    models = served.service.scoring.fusion.logic._models
    monkeypatch.setitem(models, "patient", StandsOut(models["patient"]))
    images = pictures(3)
    alone = triage(served, images[:1]).json()["lesions"][0]
    assert alone["risk"] == 0
    together = triage(served, images).json()["lesions"]
    scores = {lesion["index"]: lesion["image_score"] for lesion in together}
    mean = sum(scores.values()) / 3
    for lesion in together:
        assert lesion["risk"] == pytest.approx(abs(lesion["image_score"] - mean), abs=1e-6)
    with_blank = triage(served, [*images, blank_image()]).json()["lesions"]
    assert with_blank[0]["index"] == 3 and with_blank[0]["rank"] is None
    assert with_blank[1:] and [lesion["risk"] for lesion in with_blank[1:]] == pytest.approx(
        [lesion["risk"] for lesion in together], abs=1e-6
    )


def test_what_the_model_abstains_from_comes_first_and_has_no_rank(served):
    answer = triage(served, [*pictures(2), blank_image()]).json()
    assert [lesion["rank"] for lesion in answer["lesions"]] == [None, 1, 2]
    assert answer["lesions"][0]["index"] == 2 and answer["lesions"][0]["reasons"]


def test_wrong_items_are_named_and_do_not_stop_the_others(served):
    images = [pictures(1)[0], b"text", *pictures(2)[1:]]
    answer = triage(served, images, metadata=json.dumps([None, None, {"age_approx": 400}])).json()
    assert [lesion["index"] for lesion in answer["lesions"]] == [0]
    assert [(item["index"], item["error"]) for item in answer["refused"]] == [
        (1, "unsupported_media_type"),
        (2, "invalid_field"),
    ]
    assert len(served.rows()) == 1


def test_a_repeated_key_gives_the_same_ranking_and_stores_it_once(served):
    first, second = (triage(served, pictures(3), key="visit-1").json() for _ in range(2))
    assert [lesion["prediction_id"] for lesion in first["lesions"]] == [
        lesion["prediction_id"] for lesion in second["lesions"]
    ]
    assert [lesion["rank"] for lesion in first["lesions"]] == [lesion["rank"] for lesion in second["lesions"]]
    assert len(served.rows()) == 3


def test_a_patient_must_be_named_and_a_model_without_comparison_says_so(served, tmp_path):
    problem(triage(served, pictures(1), patient_id=" "), 422, "patient_id")
    problem(served.client.post("/v1/patients/triage", files=[("images", ("x", pictures(1)[0]))]), 422, "patient_id")
    from serve.settings import ModelReference

    bundle = tiny_bundle(tmp_path / "plain", contexts=["image_only", "none"])
    plain = ModelReference(bundle_uri=str(tmp_path / "plain"), sha256=bundle.digest, version="8")
    home = tmp_path / "plain-home"
    home.mkdir()
    other = Served(plain, (LocalScorer(plain), LocalFusion(plain)), home)
    with other.client:
        answer = triage(other, pictures(2))
        problem(answer, 409, "compares no lesions")
        assert other.rows() == []


def test_a_thousand_tiles_of_one_patient_are_one_request(reference, dermray_home):
    served = LocalService(reference, dermray_home)
    tiles = [lesion_image(seed) for seed in range(20)]
    with served.client:
        answer = triage(served, tiles * 50).json()
        assert sorted(lesion["index"] for lesion in answer["lesions"]) == list(range(1000))
        assert [lesion["rank"] for lesion in answer["lesions"]][0] == 1
        assert len(served.rows()) == 1000 and len(served.image_files()) == 20
        refused = triage(served, [*tiles * 50, tiles[0]])
        assert refused.status_code == 400 and "1000" in refused.json()["detail"]


def test_a_key_of_other_routes_gives_no_ranking(served):
    images = pictures(2)
    files = [("images", ("x", image)) for image in images]
    batch = served.client.post(
        "/v1/predict/batch", files=files, data={"patient_id": "patient 1"}, headers={"Idempotency-Key": "visit-1"}
    )
    assert [item["context"] for item in batch.json()] == ["image_only"] * 2
    answer = triage(served, images, key="visit-1").json()
    assert answer["lesions"] == []
    for item in answer["refused"]:
        assert item["error"] == "invalid_field" and "used with another route; send a new one" in item["detail"]
    # And the other way round, also for one lesion of it.
    first = triage(served, images, key="visit-2").json()
    data, headers = {"patient_id": "patient 1"}, {"Idempotency-Key": "visit-2"}
    for item in served.client.post("/v1/predict/batch", files=files, data=data, headers=headers).json():
        assert "used with another route" in item["detail"]
    one = served.client.post(
        "/v1/predict", files={"image": ("x", images[0])}, data=data, headers={"Idempotency-Key": "visit-2/0"}
    )
    problem(one, 422, "used with another route")
    assert ranking(triage(served, images, key="visit-2").json()) == ranking(first)
    assert len(served.rows()) == 4


def test_another_patient_under_the_same_key_is_refused(served):
    triage(served, pictures(2), key="visit-1")
    answer = triage(served, pictures(2), key="visit-1", patient_id="patient 2").json()
    assert answer["lesions"] == [] and len(served.rows()) == 2
    assert all("used with another patient_id" in item["detail"] for item in answer["refused"])


def test_a_repeat_with_further_lesions_is_refused_as_a_whole_and_stores_none(served):
    triage(served, pictures(2), key="visit-1")
    problem(triage(served, pictures(3), key="visit-1"), 422, "used with other lesions")
    assert len(served.rows()) == 2


def test_a_repeat_with_a_picture_that_was_refused_before_has_the_same_answer_and_scores_nothing(served, monkeypatch):
    images = [pictures(1)[0], b"text", pictures(2)[1]]
    first = triage(served, images, key="visit-1").json()

    async def never(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(served.service.scoring.scorer, "score", never)
    assert [item["index"] for item in first["refused"]] == [1] and len(first["lesions"]) == 2
    again = triage(served, images, key="visit-1").json()
    assert again["refused"] == first["refused"]
    assert ranking(again) == ranking(first)


def test_ranks_of_one_answer_never_come_from_two_comparisons(served):
    """Two requests under one key at the same time, of which the second has a lesion more."""
    find = served.sidecar.find

    async def commits_meanwhile(caller, keys):
        served.sidecar.find = find
        found = await find(caller, keys)
        lesions = parse_lesions(
            pictures(2), None, Origin(patient_id="patient 1"), "visit-1", caller, now_us(), served.service
        )
        await served.service.predict(lesions, "/v1/patients/triage", patient=True)
        return found

    served.sidecar.find = commits_meanwhile
    for _ in range(2):
        problem(triage(served, pictures(3), key="visit-1"), 422, "used with other lesions")
    # The same request at the same time is the same answer.
    served.sidecar.find = commits_meanwhile
    ids = [lesion["prediction_id"] for lesion in triage(served, pictures(2), key="visit-1").json()["lesions"]]
    assert set(ids) <= {row["id"] for row in served.rows()} and len(ids) == 2
