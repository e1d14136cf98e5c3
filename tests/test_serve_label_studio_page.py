"""Tasks go out by the page and come back as labels: the same tasks as the job's, all or nothing, once, by reviewers."""

from __future__ import annotations

import io
import json
import re
import zipfile
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import sqlalchemy as sql
from starlette.testclient import TestClient

from ray_jobs.export_label_tasks import ExportLabelTasksConfig
from ray_jobs.export_label_tasks import run as export_job
from serve import label_exchange, label_tasks_zip
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.label_exchange import MAX_EXPORT_BYTES
from serve.label_studio_page import LABEL_STUDIO_PATH, LABELS_PATH, TASKS_PATH
from store.api_keys import create_api_key, list_api_keys
from store.erasure import PatientErasure
from store.errors import StoreUnavailableError
from store.labels import NewLabel, add_label
from store.tables import labels
from tests.bundle_factory import backend, lesion_image
from tests.label_studio import annotated

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def local(local):
    """A service with six lesions, each of another patient."""
    for seed in range(6):
        predict(local, seed)
    return local


def predict(local, seed, data=None):
    files = {"image": (f"{seed}.jpg", data or lesion_image(seed), "image/jpeg")}
    given = {"patient_id": f"Mrs Smith {seed}", "institution": "clinic X"}
    answer = TestClient(local.api).post("/v1/predict", files=files, data=given)
    assert answer.status_code == 200
    return answer.json()["prediction_id"]


def token(client) -> str:
    return re.search(r'name="csrf_token" value="([^"]+)"', client.get(LABEL_STUDIO_PATH).text)[1]


def download(local, **values):
    form = {"csrf_token": token(local.client), "tasks": "200", "days": "", "seed": "0"} | values
    return local.client.post(TASKS_PATH, data=form)


def unpacked(answer) -> tuple[str, dict[str, bytes]]:
    """The folder that all files lie in, and the files below it."""
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/zip", answer.text
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.testzip() is None
    (root,) = {"/".join(name.split("/")[:2]) for name in archive.namelist()}
    return root, {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()}


def tasks_of(answer) -> list[dict]:
    return json.loads(unpacked(answer)[1]["tasks.json"])


def ids(tasks) -> list[str]:
    return [task["data"]["prediction_id"] for task in tasks]


def send(local, content, client=None, **values):
    client = client or local.client
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    form = {"csrf_token": token(client), "instance": "label-studio", "action": "import"} | values
    return client.post(LABELS_PATH, data=form, files={"file": ("export.json", data, "application/json")})


def figures(answer) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"<dt>([^<]+)</dt><dd>(\d+)</dd>", answer.text)}


def problems(answer) -> list[str]:
    listed = re.search(r'<ul id="problems">(.*?)</ul>', answer.text, re.S)[1]
    return [re.sub(r"<[^>]+>", "", line).strip() for line in re.findall(r"<li>(.*?)</li>", listed, re.S)]


def stored(local) -> list[dict]:
    with local.log.store.reading() as connection:
        return [dict(row) for row in connection.execute(sql.select(labels).order_by(labels.c.id)).mappings()]


def audit(local, action) -> list[dict]:
    return [entry for entry in local.log.store.audit_entries() if entry["action"] == action]


def test_the_tasks_are_the_job_s_with_their_pictures_below_label_studio_s_root(local, reference, dermray_home):
    for number, seed in ((2, 0), (4, 3)):
        config = ExportLabelTasksConfig(bundle=reference.bundle_uri, num_tasks=number, seed=seed, suggestion=False)
        export_job(config)
        of_job = json.loads((dermray_home / "label-tasks" / "tasks.json").read_text())
        root, files = unpacked(download(local, tasks=str(number), seed=str(seed)))
        of_page = json.loads(files["tasks.json"])
        assert len(of_page) == number
        for job, page in zip(of_job, of_page, strict=True):
            address = page["data"].pop("image")
            del job["data"]["image"]
            assert job == page
            name = address.removeprefix(f"/data/local-files/?d={root}/")
            shown = local.client.get(f"/v1/predictions/{page['data']['prediction_id']}/image").content
            assert files.pop(name) == shown
        config_file = (dermray_home / "label-tasks" / "labelling_config.xml").read_bytes()
        assert files.pop("labelling_config.xml") == config_file and ElementTree.fromstring(config_file).tag == "View"
        assert sorted(files) == ["README.txt", "tasks.json"]


def test_tasks_say_who_the_patient_is_to_nobody_and_what_the_model_says_only_if_asked(local):
    row = local.rows()[0]
    for asked in ("", "yes"):
        answer = download(local, suggestion=asked)
        assert all(("predictions" in task) is bool(asked) for task in tasks_of(answer))
        text = b"\n".join(unpacked(answer)[1].values())
        assert b"Smith" not in text and b"clinic X" not in text and row["patient_hmac"].encode() not in text
        assert (b"score" in text) is bool(asked)


def test_pictures_are_without_what_the_camera_wrote(local):
    secret = b"GPS 48.1 N, 11.5 E"
    plain = lesion_image(77)
    predict(
        local, 77, plain[:2] + b"\xff\xe1" + (2 + 6 + len(secret)).to_bytes(2, "big") + b"Exif\0\0" + secret + plain[2:]
    )
    _, files = unpacked(download(local))
    pictures = [data for name, data in files.items() if name.startswith("pictures/")]
    assert len(pictures) == 7 and secret not in b"".join(pictures)
    assert all(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None for data in pictures)


def test_the_same_tasks_are_the_same_bytes_and_unpack_into_one_folder_readable_by_all(local):
    first, again = download(local), download(local)
    assert first.content == again.content
    archive = zipfile.ZipFile(io.BytesIO(first.content))
    name = first.headers["content-disposition"].removeprefix('attachment; filename="').removesuffix('.zip"')
    for entry in archive.infolist():
        assert re.fullmatch(rf"dermray/{name}/(pictures/\d{{4}}\.(jpg|png)|[\w]+\.(json|xml|txt))", entry.filename)
        assert entry.external_attr >> 16 == 0o644 and entry.date_time == (1980, 1, 1, 0, 0, 0)


def test_only_unlabelled_lesions_of_the_asked_days_are_taken(local):
    rows = local.rows()
    add_label(local.log.store, NewLabel(rows[0]["id"], "benign", False, "Ada"), "Ada")
    with local.log.store.writing() as connection:
        old = rows[1]["received_at"] - 3 * 86_400_000_000
        connection.exec_driver_sql(f"UPDATE predictions SET received_at = {old} WHERE id = '{rows[1]['id']}'")
    assert set(ids(tasks_of(download(local)))) == {row["id"] for row in rows[1:]}
    assert set(ids(tasks_of(download(local, days="2")))) == {row["id"] for row in rows[2:]}
    assert set(ids(tasks_of(download(local, days="5")))) == {row["id"] for row in rows[1:]}


def test_a_download_is_in_the_audit_trail_before_it_leaves(local):
    tasks = tasks_of(download(local, tasks="4", days="7", seed="5"))
    (entry,) = audit(local, "hand_out_label_tasks")
    assert entry["actor"] == "anonymous" and entry["subject"].startswith("label_tasks/label-tasks-")
    detail = entry["detail"]
    assert (detail["num_tasks"], detail["available"], detail["seed"], detail["suggestion"]) == (4, 6, 5, False)
    assert detail["since"].endswith("T00:00:00+00:00") and len(tasks) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tasks", "0"),
        ("tasks", "201"),
        ("tasks", ""),
        ("tasks", "1e2"),
        ("days", "0"),
        ("days", "-1"),
        ("days", "\u0663"),
    ]
    + [("days", "99999"), ("seed", ""), ("seed", str(2**31)), ("seed", HOSTILE)],
)
def test_a_number_that_is_out_of_range_is_named_and_nothing_is_handed_out(local, field, value):
    answer = download(local, **{field: value})
    assert answer.status_code == 422 and f"{field}: " in answer.text and "expected a number from" in answer.text
    assert HOSTILE not in answer.text and not audit(local, "hand_out_label_tasks")


def test_pictures_that_are_too_large_together_are_refused(local, monkeypatch):
    monkeypatch.setattr(label_exchange, "_MAX_PICTURE_BYTES", 6_000)
    answer = download(local)
    assert answer.status_code == 422 and "expected fewer tasks than 6" in answer.text
    assert download(local, tasks="1").status_code == 200 and len(audit(local, "hand_out_label_tasks")) == 1


def erase(local, seed):
    pseudonym = local.log.store and backend(local.service, local.log).records.pseudonym(f"Mrs Smith {seed}")
    PatientErasure(local.log.store, local.log.image_files, local.log.spool).erase(pseudonym, "admin")


def test_without_unlabelled_lesions_there_is_a_reason_and_no_zip(local):
    for seed in range(6):
        erase(local, seed)
    answer = download(local, days="30")
    assert answer.status_code == 422 and "no unlabelled lesion of the last 30 days" in answer.text


def test_a_patient_erased_while_the_zip_is_made_is_not_in_it(local, monkeypatch):
    """Once after the lesions were chosen, and once after their pictures were read."""
    first, *_, last = sorted(local.rows(), key=lambda row: row["id"])
    patients = {backend(local.service, local.log).records.pseudonym(f"Mrs Smith {seed}"): seed for seed in range(6)}
    written = []
    add = label_tasks_zip._add

    def meanwhile(archive, path, data, compression):
        add(archive, path, data, compression)
        written.append(path)
        if len(written) == 2:
            for row in (first, last):
                erase(local, patients[row["patient_hmac"]])

    monkeypatch.setattr(label_tasks_zip, "_add", meanwhile)
    _, files = unpacked(download(local))
    tasks = json.loads(files["tasks.json"])
    assert len(tasks) == 4 and not {first["id"], last["id"]} & set(ids(tasks))
    assert len([name for name in files if name.startswith("pictures/")]) == 4
    (entry,) = audit(local, "hand_out_label_tasks")
    assert entry["detail"]["num_tasks"] == 4


def test_tasks_go_out_and_come_back_as_labels_once(local):
    tasks = tasks_of(download(local))
    with local.log.store.writing() as connection:
        missed = ids(tasks)[:2]
        connection.exec_driver_sql(f"UPDATE predictions SET threshold = 2.0 WHERE id IN ('{missed[0]}', '{missed[1]}')")
        connection.exec_driver_sql(
            f"UPDATE predictions SET threshold = 0.0 WHERE id NOT IN ('{missed[0]}', '{missed[1]}')"
        )
    content = annotated(tasks)
    first = send(local, content, names="1 = Dr Weber\r\n\r\n2=Ada")
    assert first.status_code == 200 and "Dr Weber" in first.text
    assert figures(first) == {
        "Stored": 6,
        "Corrected": 0,
        "Already known": 0,
        "Older than what is stored": 0,
        "Missed cancers": 2,
        "Skipped by the annotator": 0,
        "Left out: not in the log": 0,
    }
    rows = stored(local)
    assert {row["prediction_id"] for row in rows} == set(ids(tasks)) and len(local.log.store.alarms()) == 2
    assert {(row["labeller"], row["source"], row["label"]) for row in rows} == {
        ("Dr Weber", "label_studio", "malignant")
    }
    assert {entry["actor"] for entry in audit(local, "label")} == {"anonymous"}
    again = figures(send(local, content, names="1 = Dr Weber"))
    assert (again["Stored"], again["Already known"], again["Missed cancers"]) == (0, 6, 0) and stored(local) == rows
    # What was labelled is not taken along again.
    assert download(local).status_code == 422


def test_an_annotation_that_was_edited_corrects_and_an_older_one_undoes_nothing(local):
    tasks = tasks_of(download(local, tasks="1"))
    send(local, annotated(tasks))
    later = figures(send(local, annotated(tasks, "benign", at="2024-06-02T00:00:00Z")))
    assert (later["Stored"], later["Corrected"]) == (0, 1)
    older = figures(send(local, annotated(tasks, at="2024-05-30T00:00:00Z")))
    assert older["Older than what is stored"] == 1
    first, second = stored(local)
    assert (first["label"], second["label"], second["supersedes"]) == ("malignant", "benign", first["id"])


def test_one_wrong_annotation_keeps_all_out_and_each_wrong_one_is_named(local):
    content = annotated(tasks_of(download(local)))
    value = content[1]["annotations"][0]["result"][0]["value"]
    value["choices"] = [HOSTILE]
    content[2]["annotations"][0]["updated_at"] = "yesterday"
    content[3]["data"] = {"prediction_id": "never-made"}
    # Nobody was answered by a shadow's record, which is in the log.
    shadow = {"prediction_id": ids(content)[0] + ".shadow"}
    with local.log.store.writing() as connection:
        query = (
            f"UPDATE predictions SET id = '{shadow['prediction_id']}', role = 'shadow' WHERE id = '{ids(content)[4]}'"
        )
        connection.exec_driver_sql(query)
    content[4]["data"] = shadow
    answer = send(local, content)
    assert answer.status_code == 422 and "Nothing was stored" in answer.text and stored(local) == []
    assert HOSTILE not in answer.text
    found = problems(answer)
    assert len(found) == 4 and "4 of 6 annotations" in answer.text
    assert "task 12, annotation 101: label is" in found[0] and "expected one of benign, malignant" in found[0]
    assert found[1].startswith("task 13, annotation 102: updated_at is &#39;yesterday&#39;; expected an ISO 8601 time")
    assert found[2].startswith("task 14, annotation 103: prediction_id is never-made; expected one of the log.")
    assert found[3].startswith("task 15, annotation 104: prediction_id is") and ".shadow" in found[3]
    # Those that are not in the log may be left out, the others may not.
    assert send(local, content, without_gone="yes").status_code == 422 and stored(local) == []
    left = figures(send(local, [content[0], *content[3:]], without_gone="yes"))
    assert (left["Stored"], left["Left out: not in the log"]) == (2, 2) and len(stored(local)) == 2


def test_a_patient_erased_before_the_annotations_come_back_is_named_and_stays_erased(local):
    content = annotated(tasks_of(download(local)))
    erase(local, 3)
    answer = send(local, content)
    assert answer.status_code == 422 and len(problems(answer)) == 1 and "erased since" in problems(answer)[0]
    assert figures(send(local, content, without_gone="yes"))["Stored"] == 5
    assert len(stored(local)) == 5 == len(local.rows())


def test_a_patient_erased_while_labels_are_stored_is_left_out_and_said_so(local, monkeypatch):
    content = annotated(tasks_of(download(local)))
    store_labels = label_exchange.store_labels

    def meanwhile(*arguments):
        erase(local, 3)
        return store_labels(*arguments)

    monkeypatch.setattr(label_exchange, "store_labels", meanwhile)
    found = figures(send(local, content))
    assert (found["Stored"], found["Left out: not in the log"]) == (5, 1)


def test_a_task_that_its_annotator_skipped_is_no_problem(local):
    content = annotated(tasks_of(download(local)))
    content[0]["annotations"][0]["was_cancelled"] = True
    found = figures(send(local, content))
    assert (found["Stored"], found["Skipped by the annotator"]) == (5, 1)


def test_a_check_counts_and_stores_nothing(local):
    content = annotated(tasks_of(download(local)), by="ada@clinic.example")
    answer = send(local, content, action="check")
    assert answer.status_code == 200 and figures(answer)["Labels"] == 6 and "ada@clinic.example" in answer.text
    assert stored(local) == [] and "nothing was stored yet" in answer.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"PK\x03\x04", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "expected a JSON list of tasks"),
        (b'[{"data": {}}]', "neither a task with annotations"),
        (b'[{"annotations": [' + b",".join([b"null"] * 5_001) + b"]}]", "more than 5000 annotations"),
    ],
)
def test_a_file_that_is_no_export_is_refused(local, content, says):
    answer = send(local, content)
    assert answer.status_code == 422 and says in answer.text and stored(local) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("instance", "a b"), ("instance", ""), ("names", "Dr Weber"), ("names", "1 ="), ("names", "1 = A\n1 = B")]
    + [("names", "\n".join(f"{number} = x" for number in range(101))), ("instance", HOSTILE)],
)
def test_a_field_that_is_wrong_is_named_and_comes_back(local, field, value):
    answer = send(local, annotated(tasks_of(download(local))), **{field: value})
    assert answer.status_code == 422 and f"{field}: " in answer.text and "expected" in answer.text
    assert stored(local) == [] and HOSTILE not in answer.text


def test_many_problems_are_counted_and_not_all_listed(local):
    content = [{"id": 1, "data": {}, "annotations": [{"id": number} for number in range(150)]}]
    answer = send(local, content)
    assert len(problems(answer)) == 100 and "And 50 more." in answer.text and "150 of 150" in answer.text


def test_a_file_that_is_too_long_is_refused_before_it_is_read_and_one_without_a_file_is_told(local):
    long = send(local, b" " * (MAX_EXPORT_BYTES + 2**21))
    assert long.status_code == 413 and "smaller file" in long.text
    assert send(local, b" " * (MAX_EXPORT_BYTES + 1)).status_code == 422
    form = {"csrf_token": token(local.client), "instance": "label-studio"}
    answer = local.client.post(LABELS_PATH, data=form)
    assert answer.status_code == 422 and "file: none was chosen" in answer.text


def test_a_store_that_goes_away_midway_is_told_and_the_rest_is_stored_by_the_same_file(local, monkeypatch):
    content = annotated(tasks_of(download(local)))
    monkeypatch.setattr(label_exchange, "_CHUNK", 2)
    store_labels, calls = label_exchange.store_labels, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise StoreUnavailableError("the database is down")
        return store_labels(*arguments)

    monkeypatch.setattr(label_exchange, "store_labels", failing)
    answer = send(local, content)
    assert answer.status_code == 503 and "2 of 6 labels or more are stored" in answer.text and len(stored(local)) == 2
    again = figures(send(local, content))
    assert (again["Stored"], again["Already known"]) == (4, 2) and len(stored(local)) == 6


def test_labels_of_records_that_wait_for_the_store_are_not_called_erased(local, monkeypatch):
    content = annotated(tasks_of(download(local)))
    content[0]["data"]["prediction_id"] = "not-yet-there"
    monkeypatch.setattr(local.log.spool, "pending", lambda: 1)
    answer = send(local, content)
    assert answer.status_code == 503 and "wait for the store" in answer.text and stored(local) == []


class Guarded:
    """A service that asks for keys, and a browser's client of it."""

    def __init__(self, local, role):
        _, self.key = create_api_key(local.log.store, f"a {role}", role, "test")
        ring = KeyRing(lambda: list_api_keys(local.log.store, live_only=True), refresh_s=60)
        guarded = backend(local.service, local.log, keys=ring)
        self.client = TestClient(build_api(guarded), raise_server_exceptions=False, follow_redirects=False)

    def sign_in(self):
        page = self.client.get("/sign-in")
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', page.text)[1]
        assert self.client.post("/sign-in", data={"csrf_token": csrf, "next": "/", "key": self.key}).status_code == 303
        return csrf


def test_a_caller_sees_neither_page_nor_tasks_and_brings_no_labels(local):
    content = annotated(tasks_of(download(local)))
    guarded = Guarded(local, "caller")
    with guarded.client as client:
        assert client.get(LABEL_STUDIO_PATH).status_code == 303
        guarded.sign_in()
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', client.get("/").text)[1]
        file = {"file": ("export.json", json.dumps(content).encode(), "application/json")}
        answers = [
            client.get(LABEL_STUDIO_PATH),
            client.post(TASKS_PATH, data={"csrf_token": csrf, "tasks": "5", "days": "", "seed": "0"}),
            client.post(LABELS_PATH, data={"csrf_token": csrf, "instance": "x"}, files=file),
        ]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert all("needs reviewer" in answer.text for answer in answers) and stored(local) == []


def test_a_reviewer_is_the_actor_and_the_annotator_the_labeller(local):
    guarded = Guarded(local, "reviewer")
    with guarded.client as client:
        guarded.sign_in()
        form = {"csrf_token": token(client), "tasks": "2", "days": "", "seed": "0"}
        tasks = tasks_of(client.post(TASKS_PATH, data=form))
        assert figures(send(local, annotated(tasks), client))["Stored"] == 2
    assert [entry["actor"] for entry in audit(local, "hand_out_label_tasks")] == ["a reviewer"]
    assert {entry["actor"] for entry in audit(local, "label")} == {"a reviewer"}
    assert {row["labeller"] for row in stored(local)} == {"label-studio user 1"}


def test_forms_of_other_sites_are_refused(local):
    content = annotated(tasks_of(download(local)))
    for csrf in ("", "x" * 43):
        assert send(local, content, csrf_token=csrf).status_code == 403
        assert download(local, csrf_token=csrf).status_code == 403
    assert stored(local) == [] and len(audit(local, "hand_out_label_tasks")) == 1


def test_the_page_leads_here_and_its_fields_have_labels(local):
    assert f'href="{LABEL_STUDIO_PATH}"' in local.client.get("/review").text
    html = local.client.get(LABEL_STUDIO_PATH).text
    named = set(re.findall(r'<label for="([\w-]+)"', html))
    fields = re.findall(r"<(?:input|textarea|select) [^>]*?id=\"([\w-]+)\"", html)
    assert set(fields) == named == {"tasks", "days", "seed", "file", "instance", "names"}
    assert "<script>" not in html and " style=" not in html and 'action="/review/label-studio/labels"' in html
