"""What the page / does with forms, without a browser: addresses, reloads, outages, odd files."""

from __future__ import annotations

import csv
import io
import re

import cv2
import numpy as np
import pytest

from serve.page_pictures import PAGE_SIDE
from serve.settings import UploadLimits
from store.errors import StoreUnavailableError
from tests.bundle_factory import lesion_image
from tests.local_service import LocalService


def hidden(local) -> dict[str, str]:
    """The form's token and key."""
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', local.client.get("/").text))


def send(local, files: list[bytes], fields: dict[str, str] | None = None, **values: str):
    fields = fields or hidden(local)
    named = [("images", (f"p{index}.jpg", data, "image/jpeg")) for index, data in enumerate(files)]
    return fields["key"], local.client.post("/", data=fields | values, files=named or None)


def ids(html: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"/results/(\w{32})/picture.jpg", html)))


def problem(response) -> str:
    return re.search(r'class="problem"[^>]*>([^<]+)<', response.text)[1]


def test_a_form_that_is_sent_twice_is_stored_once_and_another_picture_under_its_key_is_refused(local):
    fields = hidden(local)
    answers = [send(local, [lesion_image(1)], fields)[1] for _ in range(2)]
    assert ids(answers[0].text) == ids(answers[1].text) and len(local.rows()) == 1
    _, other = send(local, [lesion_image(2)], fields)
    assert other.status_code == 422 and len(local.rows()) == 1
    # The form that comes back has a key of its own, so that it can be sent.
    fresh = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', other.text))
    assert fresh["key"] != fields["key"] and send(local, [lesion_image(2)], fresh)[1].status_code == 200


def test_pictures_that_were_refused_are_named_with_the_reason_and_not_forgotten_on_reload(local):
    key, answer = send(local, [lesion_image(1), b"not a picture", lesion_image(2)])
    assert answer.status_code == 200 and "p1.jpg" in answer.text and "not a JPEG, PNG or WebP file" in answer.text
    again = local.client.get(f"/results/{key}", params={"n": 3})
    assert ids(again.text) == ids(answer.text) and "Picture 2" in problem_line(again.text)
    table = list(csv.DictReader(io.StringIO(local.client.get(f"/results/{key}/table.csv", params={"n": 3}).text)))
    assert [row["picture"] for row in table if not row["prediction_id"]] == ["2"] and len(table) == 3


def problem_line(html: str) -> str:
    return re.search(r'<p class="problem"><bdi>([^<]*)</bdi>', html)[1]


def test_the_ranks_of_page_and_table_are_the_same(local):
    key, answer = send(local, [lesion_image(seed) for seed in range(6)])
    rows = list(csv.DictReader(io.StringIO(local.client.get(f"/results/{key}/table.csv", params={"n": 6}).text)))
    assert [row["prediction_id"] for row in rows] == ids(answer.text)
    risks = [float(row["risk"]) for row in rows]
    assert risks == sorted(risks, reverse=True) and [row["rank"] for row in rows] == list("123456")


def test_results_that_cannot_be_read_are_not_called_erased(local, monkeypatch):
    key, _ = send(local, [lesion_image(1)])

    def down(*_):
        raise StoreUnavailableError("the database is down")

    monkeypatch.setattr("serve.records.predictions_by_id", down)
    answer = local.client.get(f"/results/{key}", params={"n": 1})
    assert answer.status_code == 503 and "erased" not in answer.text and answer.headers["Retry-After"]


@pytest.mark.parametrize("number", ["0", "-1", "1001", "9" * 5000, "\u0661", "1e2", ""])
def test_a_number_that_cannot_be_is_no_address(local, number):
    key, _ = send(local, [lesion_image(1)])
    assert local.client.get(f"/results/{key}", params={"n": number}).status_code == 404


def test_a_picture_that_grew_when_it_was_stored_is_still_explained(reference, nodes, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    picture = cv2.resize(noise, (400, 400), interpolation=cv2.INTER_CUBIC)
    webp = cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes()
    local = LocalService(reference, tmp_path, UploadLimits(max_image_bytes=len(webp)), nodes)
    _, answer = send(local, [webp])
    assert answer.status_code == 200 and local.image_files()[0].stat().st_size > len(webp)
    (prediction_id,) = ids(answer.text)
    for name in ("picture.jpg", "evidence.jpg"):
        shown = local.client.get(f"/results/{prediction_id}/{name}")
        assert shown.status_code == 200 and shown.content.startswith(b"\xff\xd8\xff")


def test_pictures_are_small_and_sent_once(local):
    _, answer = send(local, [lesion_image(3, size=1600)])
    (prediction_id,) = ids(answer.text)
    for name in ("picture.jpg", "evidence.jpg"):
        shown = local.client.get(f"/results/{prediction_id}/{name}")
        height, width = cv2.imdecode(np.frombuffer(shown.content, np.uint8), cv2.IMREAD_COLOR).shape[:2]
        assert max(height, width) == PAGE_SIDE and "private" in shown.headers["Cache-Control"]
        again = local.client.get(f"/results/{prediction_id}/{name}", headers={"If-None-Match": shown.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_what_was_entered_comes_back_with_a_refusal(local):
    _, answer = send(local, [], patient_id="P-77", age_approx="54")
    assert answer.status_code == 422 and "none was chosen" in problem(answer)
    assert 'value="P-77"' in answer.text and 'value="54"' in answer.text


@pytest.mark.parametrize(("field", "value"), [("age_approx", "old"), ("age_approx", "500"), ("sex", "x\x00y")])
def test_a_field_that_is_wrong_is_named(local, field, value):
    _, answer = send(local, [lesion_image(1)], **{field: value})
    assert answer.status_code == 422 and local.rows() == []
    assert field in problem(answer) or "Age" in problem(answer)


def test_lesions_of_one_form_without_a_patient_are_still_one_patient_s(local):
    send(local, [lesion_image(seed) for seed in range(3)])
    send(local, [lesion_image(9)])
    patients = [row["patient_hmac"] for row in local.rows()]
    assert len(set(patients[:3])) == 1 and patients[0] is not None and patients[3] is None
