"""The log for people, on the real routes: records, pictures, labels, alarms, figures, erasure."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime

import pytest

from monitoring.prediction_log import EMBEDDING_DIM, PredictionRecord, patient_hmac
from store import database
from store.candidates import record_candidate
from store.dataset_lineage import Member, finish_dataset_version, register_dataset_version
from store.image_files import ImageFiles
from store.tables import now_us
from tests.bundle_factory import (
    LocalFusion,
    LocalScorer,
    lesion_image,
    served_bundle,
)
from tests.local_service import LocalService

KEY = b"a test's secret"
OLD = 1_714_555_800_000_000  # 2024-05-01T09:30:00Z


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("records") / "bundle", version="7")


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


class Served(LocalService):
    """A client of the service, its log, and its sidecar."""

    def __init__(self, reference, nodes, home):
        super().__init__(reference, home, nodes=nodes, retry_after_s=3)

    def predict(self, seed=0, suffix=".jpg", **form):
        image = {"image": ("lesion", lesion_image(seed, suffix=suffix))}
        response = self.client.post("/v1/predict", files=image, data=form)
        assert response.status_code == 200, response.text
        return response.json()["prediction_id"]

    def add(self, prediction_id, **values):
        """A record of two years ago, below its threshold."""
        base = {"received_at": OLD, "model_version": "7", "context": "none", "risk": 0.01, "threshold": 0.05}
        record = PredictionRecord(id=prediction_id, embedding=bytes(2 * EMBEDDING_DIM), **(base | values))
        self.log.write([record], {})

    def get(self, path, **query):
        return self.client.get(path, params=query)

    def listed(self, **query):
        response = self.get("/v1/predictions", **query)
        assert response.status_code == 200, response.text
        return [item["prediction_id"] for item in response.json()["items"]]

    def label(self, prediction_id, label="malignant", **fields):
        return self.client.post("/v1/labels", json={"prediction_id": prediction_id, "label": label, **fields})


@pytest.fixture
def served(reference, nodes, dermray_home):
    with_client = Served(reference, nodes, dermray_home)
    with with_client.client:
        yield with_client


def problem(response, status, text=""):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"} and "\n" not in body["detail"]
    assert text in body["detail"], body
    return body


def test_a_record_is_what_was_answered_with_its_origin_and_no_embedding(served):
    prediction_id = served.predict(
        metadata=json.dumps({"age_approx": 60}), patient_id="Jane Doe", acquired_at="2024-05-01T09:30:00.25Z"
    )
    response = served.get(f"/v1/predictions/{prediction_id}")
    record = response.json()
    assert response.status_code == 200 and record["labels"] == [] and record["labelled"] is False
    assert record["acquired_at"] == "2024-05-01T09:30:00.250000Z" and record["metadata"] == {"age_approx": 60.0}
    assert record["patient_hmac"] == patient_hmac("Jane Doe", KEY)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(record["received_at"])).total_seconds()) < 60
    assert set(record["quality"]) == {"brightness", "contrast", "blur", "red", "green", "blue"}
    (item,) = served.get("/v1/predictions").json()["items"]
    assert item == {name: value for name, value in record.items() if name not in ("labels", "truth", "used_in")}
    assert "embedding" not in item and "Jane" not in response.text


def test_pages_follow_the_cursor_to_the_end(served):
    for index in range(7):
        served.add(f"p{index}", received_at=OLD + index // 3)
    seen, cursor = [], None
    while True:
        page = served.get("/v1/predictions", limit=3, **({"cursor": cursor} if cursor else {})).json()
        seen.append([item["prediction_id"] for item in page["items"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == [["p6", "p5", "p4"], ["p3", "p2", "p1"], ["p0"]]
    # A last page that is just full says so.
    assert served.get("/v1/predictions", limit=7).json()["next_cursor"] is None


def test_filters_reach_the_log(served):
    served.add("old", risk=0.2, institution="clinic", patient_hmac=patient_hmac("Jane Doe", KEY))
    served.add("new", received_at=OLD + 1_000_000, risk=0.9, band="high")
    assert served.listed(patient_id="Jane Doe") == served.listed(institution="clinic") == ["old"]
    assert served.listed(**{"from": "2024-05-01T09:30:01Z"}) == served.listed(min_risk=0.5) == ["new"]
    assert served.listed(to="2024-05-01T11:30:01+02:00") == served.listed(max_risk=0.5) == ["old"]
    assert served.listed(band="high", model_version="7", context="none", abstained=False) == ["new"]
    assert served.listed(role="shadow") == served.listed(patient_id="jane doe") == []
    served.label("old", "benign")
    assert served.listed(labelled=True) == ["old"] and served.listed(labelled=False) == ["new"]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ({"cursor": "AAAA"}, "cursor: damaged"),
        ({"cursor": "ü" * 9}, "cursor: damaged"),
        ({"cursor": "WzEsMl0"}, "cursor: damaged"),  # [1,2]: an alarm's
        ({"cursor": "WzksIlx1MDAwMCJd"}, "cursor: damaged"),  # an id of NUL
        ({"cursor": "WzkyMjMzNzIwMzY4NTQ3NzU4MDgsImEiXQ"}, "cursor: damaged"),  # [2**63, "a"]
        ({"cursor": "WzUsICJhIl0"}, "cursor: damaged"),  # [5, "a"] with a space
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"limit": 10**30}, "limit"),
        ({"from": "noon"}, "from: 'noon'"),
        ({"from": "2024-05-02", "to": "2024-05-01"}, "to: '2024-05-01' is before from"),
        ({"to": "1969-01-01"}, "to: '1969-01-01'"),
        ({"min_risk": "nan"}, "min_risk"),
        ({"min_risk": 0.5, "max_risk": 0.4}, "max_risk: 0.4"),
        ({"band": "lower"}, "band"),
        ({"role": "king"}, "role"),
        ({"patient_id": "a\x00b"}, "patient_id: "),
        ({"device": "x" * 256}, "device: 256 characters"),
        ({"bnad": "low"}, "bnad"),
    ],
)
def test_a_wrong_filter_is_a_422_that_names_it(served, query, text):
    served.add("a")
    problem(served.get("/v1/predictions", **query), 422, text)


def test_an_unknown_id_is_a_404_unless_the_spool_may_hold_it(served):
    problem(served.get("/v1/predictions/unknown"), 404, "'unknown' is not in the log")
    problem(served.label("unknown"), 404, "unknown")
    problem(served.get("/v1/predictions/%00"), 422, "prediction_id")
    problem(served.get("/v1/predictions/" + "x" * 65), 422, "prediction_id")
    served.add("known")
    served.sidecar.down = ConnectionError("gone")
    spooled = served.predict()
    for response in (
        served.get(f"/v1/predictions/{spooled}"),
        served.get(f"/v1/predictions/{spooled}/image"),
        served.label(spooled),
    ):
        problem(response, 503, spooled)
        assert response.headers["Retry-After"] == "3"
    assert served.get("/v1/predictions/known").status_code == 200
    served.sidecar.down = None
    served.log.replay_spool()
    assert served.get(f"/v1/predictions/{spooled}").status_code == 200


def test_while_the_store_does_not_answer_there_is_a_503(served, monkeypatch):
    served.add("a")

    def fail(*_):
        raise database.StoreUnavailableError("locked")

    monkeypatch.setattr(database.Store, "reading", fail)
    monkeypatch.setattr(database.Store, "writing", fail)
    for response in (
        served.get("/v1/predictions"),
        served.get("/v1/alarms"),
        served.get("/v1/monitoring/summary"),
        served.label("a"),
        served.client.delete("/v1/patients/x"),
    ):
        problem(response, 503, "the store does not answer")
        assert response.headers["Retry-After"] == "3"


@pytest.mark.parametrize(("suffix", "content_type"), [(".jpg", "image/jpeg"), (".png", "image/png")])
def test_the_picture_comes_as_it_was_stored_and_once(served, suffix, content_type):
    prediction_id = served.predict(suffix=suffix)
    name = served.get(f"/v1/predictions/{prediction_id}").json()["image_hash"]
    url = f"/v1/predictions/{prediction_id}/image"
    response = served.get(url)
    assert response.status_code == 200 and response.content == served.log.image_files.get(name, suffix)
    assert response.headers["content-type"] == content_type and response.headers["etag"] == f'"{name}"'
    assert response.headers["content-disposition"] == f'inline; filename="{name}{suffix}"'
    assert "private" in response.headers["cache-control"]
    for tag in (f'"{name}"', f'W/"{name}"', f'"x", "{name}"', "*"):
        again = served.client.get(url, headers={"If-None-Match": tag})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == f'"{name}"'
    assert served.client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    served.log.image_files.remove(name)
    assert problem(served.get(url), 404, "no longer kept")["error"] == "image_erased"


def test_a_record_without_a_picture_says_so(served):
    served.add("a")
    assert problem(served.get("/v1/predictions/a/image"), 404)["error"] == "image_erased"


def test_a_label_is_stored_once_and_a_missed_cancer_alarms_once(served):
    served.add("a")
    first = served.label("a", confidence=0.9, comment="histology\nconfirmed", labelled_at="2024-06-01")
    assert first.status_code == 201
    label = first.json()
    assert (label["label"], label["malignant"], label["labeller"]) == ("malignant", True, "anonymous")
    assert label["labelled_at"] == "2024-06-01T00:00:00Z" and label["supersedes"] is None
    again = served.label("a", confidence=0.9, comment="histology\nconfirmed")
    assert again.status_code == 200 and again.json() == label
    corrected = served.label("a", "benign")
    assert corrected.status_code == 201 and corrected.json()["supersedes"] == label["id"]
    assert served.label("a", labeller="Dr Weber").json()["labeller"] == "Dr Weber"
    record = served.get("/v1/predictions/a").json()
    assert [item["label"] for item in record["labels"]] == ["malignant", "benign", "malignant"]
    (alarm,) = served.get("/v1/alarms").json()["items"]
    assert (alarm["kind"], alarm["severity"]) == ("missed_cancer", "critical")
    assert alarm["detail"]["prediction_id"] == "a"


def test_concurrent_malignant_labels_raise_one_alarm(served):
    served.add("a")
    start, statuses = threading.Barrier(4), []

    def send(name):
        start.wait()
        statuses.append(served.label("a", labeller=name).status_code)

    threads = [threading.Thread(target=send, args=(f"expert {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [201] * 4
    assert len(served.get("/v1/alarms").json()["items"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"prediction_id": "a"}', 422, "label: Field required"),
        (b'{"prediction_id": "a", "label": "melanoma"}', 422, "label: 'melanoma'; expected one of benign, malignant"),
        (b'{"prediction_id": "a", "label": "benign", "confidence": 2}', 422, "confidence"),
        (b'{"prediction_id": "a", "label": "benign", "confidence": NaN}', 422, "confidence"),
        (b'{"prediction_id": "a", "label": "benign", "confidence": 1%s}' % (b"0" * 400), 422, "confidence"),
        (b'{"prediction_id": "a", "label": "benign", "confidence": 1%s}' % (b"0" * 5000), 400, ""),
        (b'{"prediction_id": "a", "label": "benign", "comment": "%s"}' % (b"x" * 2001), 422, "comment: 2001"),
        (b'{"prediction_id": "a", "label": "benign", "comment": "\\u0000"}', 422, "comment"),
        (b'{"prediction_id": "a", "label": "benign", "labeller": "\\ud800"}', 422, "labeller"),
        (b'{"prediction_id": "a", "label": "benign", "labelled_at": "2999-01-01"}', 422, "labelled_at"),
        (b'{"prediction_id": "a", "label": "benign", "\\ud800": 1}', 422, "unicode"),
        (b'{"prediction_id": "a", "label": "benign", "two\\nlines": 1}', 422, "'two\\nlines': Extra inputs"),
        (b'{"prediction_id": "a", "label": "benign", "labeler": "x"}', 422, "labeler"),
        (b'{"prediction_id": "\\u0000", "label": "benign"}', 422, "prediction_id"),
        (b'{"prediction_id": 7, "label": "benign"}', 422, "prediction_id"),
        (b"[" * 100_000, 400, ""),
        (b"\xff\xfe{", 400, ""),
        (b"null", 422, "body"),
    ],
)
def test_a_wrong_label_is_a_4xx_and_leaves_nothing(served, body, status, text):
    served.add("a")
    headers = {"content-type": "application/json"}
    problem(served.client.post("/v1/labels", content=body, headers=headers), status, text)
    assert served.get("/v1/predictions/a").json()["labels"] == []


def test_alarms_that_repeat_an_earlier_one_are_told_apart(served):
    alarm = {
        "kind": "drift",
        "severity": "warning",
        "message": "m",
        "detail": {"drifted": ["red"]},
        "topic": "drift:1:a",
    }
    for index in range(3):
        served.log.store.raise_alarm({**alarm, "dedupe_key": f"k{index}", "raised_at": OLD + index})

    def listed(**filters):
        items = served.get("/v1/alarms", **filters).json()["items"]
        return [(item["id"], item["quieted_by"]) for item in items]

    assert listed() == [(3, 1), (2, 1), (1, None)]
    assert listed(quieted=True) == [(3, 1), (2, 1)] and listed(quieted=False) == [(1, None)]
    page = served.get("/v1/alarms", quieted=True, limit=1).json()
    assert page["items"][0]["topic"] == "drift:1:a" and page["items"][0]["deliveries"] == {}
    rest = served.get("/v1/alarms", quieted=True, limit=1, cursor=page["next_cursor"]).json()
    assert [item["id"] for item in rest["items"]] == [2] and rest["next_cursor"] is None
    assert served.client.post("/v1/alarms/1/acknowledge").status_code == 200
    assert listed(unacknowledged=True) == []
    problem(served.get("/v1/alarms", quieted="perhaps"), 422, "quieted")


def test_an_alarm_is_acknowledged_once_by_name(served):
    for index in range(3):
        alarm = {"dedupe_key": f"k{index}", "kind": f"kind{index}", "severity": "warning", "message": "m"}
        served.log.store.raise_alarm(alarm | {"detail": {"x": 1}, "raised_at": OLD})
    page = served.get("/v1/alarms", limit=2).json()
    rest = served.get("/v1/alarms", limit=2, cursor=page["next_cursor"]).json()
    ids = [item["id"] for item in page["items"] + rest["items"]]
    assert ids == [3, 2, 1] and rest["next_cursor"] is None
    assert [item["kind"] for item in served.get("/v1/alarms", kind="kind1").json()["items"]] == ["kind1"]
    first = served.client.post("/v1/alarms/2/acknowledge", json={"comment": "patient called in"})
    assert first.status_code == 200 and first.json()["acknowledged_by"] == "anonymous"
    assert first.json()["detail"] == {"x": 1, "acknowledgement": "patient called in"}
    again = served.client.post("/v1/alarms/2/acknowledge")
    assert again.status_code == 200 and again.json() == first.json()
    assert [item["id"] for item in served.get("/v1/alarms", unacknowledged=True).json()["items"]] == [3, 1]
    (entry,) = served.log.store.audit_entries()
    assert (entry["actor"], entry["action"], entry["subject"]) == ("anonymous", "acknowledge_alarm", "alarm/2")
    problem(served.client.post("/v1/alarms/9/acknowledge"), 404, "no alarm 9")
    problem(served.client.post(f"/v1/alarms/{2**63}/acknowledge"), 422, "alarm_id")
    problem(served.client.post("/v1/alarms/1/acknowledge", json={"by": "me"}), 422, "by")
    problem(served.get("/v1/alarms", cursor="WzksImEiXQ"), 422, "cursor: damaged")


def test_the_summary_counts_the_last_hours(served):
    served.add("longago")
    served.predict()
    served.add("recent", received_at=now_us() - 90 * 60 * 1_000_000, abstained=True, reasons=["blurred"], risk=None)
    served.label("longago")
    summary = served.get("/v1/monitoring/summary", hours=2).json()
    assert (summary["predictions"], summary["abstained"]) == (2, 1)
    assert [entry["predictions"] for entry in summary["per_hour"]] == [1, 1]
    assert summary["abstention_reasons"] == {"blurred": 1} and summary["by_model_version"] == {"7": 2}
    assert summary["total_ms"]["mean"] > 0
    assert summary["labels"] == summary["missed_cancers"] == 1
    assert summary["unacknowledged_alarms"] == {"missed_cancer": 1}
    assert len(served.get("/v1/monitoring/summary").json()["per_hour"]) == 24
    problem(served.get("/v1/monitoring/summary", hours=721), 422, "hours")
    problem(served.get("/v1/monitoring/summary", hours=0), 422, "hours")


def test_an_erased_patient_is_gone_and_the_trail_knows_the_pseudonym_only(served):
    erased = served.predict(0, patient_id="Jane/Doe")
    shared = served.predict(1, patient_id="Jane/Doe")
    other = served.predict(1, patient_id="Max")
    served.label(erased)
    response = served.client.delete("/v1/patients/Jane%2FDoe")
    assert response.status_code == 200 and "Jane" not in response.text
    report = response.json()
    nothing = {"submissions": 0, "spooled": 0, "alarms": 0}
    assert report["counts"] | {"alarms": 0} == {"predictions": 2, "labels": 1, "images": 1, **nothing}
    assert report["image_files"] == 1 and report["log_emptied"] is True
    problem(served.get(f"/v1/predictions/{erased}/image"), 404, "erased")
    problem(served.get(f"/v1/predictions/{shared}"), 404, "erased")
    assert served.get(f"/v1/predictions/{other}/image").status_code == 200
    trail = json.dumps(served.log.store.audit_entries())
    assert patient_hmac("Jane/Doe", KEY) in trail and "Jane" not in trail
    again = served.client.delete("/v1/patients/Jane%2FDoe").json()
    assert again["image_files"] == 0 and set(again["counts"].values()) == {0}
    problem(served.client.delete("/v1/patients/%20"), 422, "patient_id: blank")
    problem(served.client.delete("/v1/patients/a%00b"), 422, "patient_id")


def test_an_erasure_that_cannot_remove_a_file_is_a_503_and_is_finished_by_the_next(served, monkeypatch):
    prediction_id = served.predict(patient_id="Jane")
    name = served.get(f"/v1/predictions/{prediction_id}").json()["image_hash"]

    def fail(*_):
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "remove", fail)
        response = served.client.delete("/v1/patients/Jane")
        problem(response, 503, "send the same request again")
        assert response.headers["Retry-After"] == "3"
    problem(served.get(f"/v1/predictions/{prediction_id}"), 404)
    assert served.log.image_files.get(name, ".jpg")
    assert served.client.delete("/v1/patients/Jane").json()["image_files"] == 1
    with pytest.raises(FileNotFoundError):
        served.log.image_files.get(name, ".jpg")


def test_the_routes_are_documented_with_their_errors(served):
    paths = served.get("/openapi.json").json()["paths"]
    expected = {
        ("/v1/predictions", "get"): {"200", "422", "503"},
        ("/v1/predictions/{prediction_id}", "get"): {"200", "404", "422", "503"},
        ("/v1/predictions/{prediction_id}/image", "get"): {"200", "304", "404", "422", "503"},
        ("/v1/labels", "post"): {"200", "201", "400", "404", "408", "409", "413", "422", "503"},
        ("/v1/alarms", "get"): {"200", "422", "503"},
        ("/v1/alarms/{alarm_id}/acknowledge", "post"): {"200", "400", "404", "408", "413", "422", "503"},
        ("/v1/monitoring/summary", "get"): {"200", "422", "503"},
        ("/v1/patients/{patient_id}", "delete"): {"200", "422", "503"},
    }
    for (path, method), statuses in expected.items():
        assert set(paths[path][method]["responses"]) == statuses, path


def test_readers_who_disagree_are_listed_until_a_third_settles_it(served):
    for name in ("p", "q", "r"):
        served.add(name)
    served.label("p", labeller="a")
    served.label("p", "benign", labeller="b")
    served.label("q", labeller="a")
    served.label("q", labeller="b")
    assert served.get("/v1/predictions/r").json()["truth"] is None
    truth = served.get("/v1/predictions/p").json()["truth"]
    assert (truth["state"], truth["label"], truth["malignant"], truth["readers"]) == ("disagreed", None, None, 2)
    assert served.listed(label_state="disagreed") == ["p"] and served.listed(label_state="agreed") == ["q"]
    problem(served.label("p", labeller="B", adjudication=True), 409, "has read prediction 'p'")
    settled = served.label("p", labeller="c", adjudication=True)
    assert settled.status_code == 201 and settled.json()["adjudication"] is True
    truth = served.get("/v1/predictions/p").json()["truth"]
    assert (truth["state"], truth["label"]) == ("adjudicated", "malignant")
    assert served.listed(label_state="disagreed") == []
    problem(served.get("/v1/predictions", label_state="unsure"), 422, "label_state")


def test_a_record_names_the_data_sets_and_models_that_learned_from_it(served):
    served.add("p")
    label = served.label("p").json()
    digest, store = "d" * 64, served.log.store
    register_dataset_version(store, digest, "/data/d", None, {}, [Member("p", label["id"], None)])
    finish_dataset_version(store, digest, 10, "prepare_dataset")
    record_candidate(store, "8", "a" * 64, {}, dataset_digest=digest)
    record = served.get("/v1/predictions/p").json()
    assert record["used_in"] == [{"dataset_digest": digest, "state": "ready", "model_versions": ["8"]}]
