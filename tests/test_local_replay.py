"""Past days replayed through the real routes: each request on its day, once; labels as late as they came."""

from __future__ import annotations

import csv
import json
from collections import Counter
from datetime import UTC, date, datetime, timedelta

import h5py
import numpy as np
import pandas as pd
import pytest

from local.replay import Answer, due_labels, main, plan_days, read_answers, read_classes
from local.traffic import Lesion
from serve.settings import IngressSettings
from store.labels import MISSED_CANCER
from tests.bundle_factory import lesion_image, served_bundle
from tests.http_server import http_server
from tests.local_service import LocalService

FIRST = date(2026, 3, 1)
PATIENTS, EACH = 6, 2


def lesion(number: int, patient: str | None) -> Lesion:
    return Lesion(f"ISIC_{number}", b"jpeg", {}, {} if patient is None else {"patient_id": patient})


def times(day: list[Lesion]) -> list[datetime]:
    return [datetime.fromisoformat(item.origin["replayed_at"]) for item in day]


def test_every_patient_comes_once_with_all_lesions_and_in_opening_hours():
    lesions = [lesion(number, f"IP_{number // 3}" if number < 60 else None) for number in range(66)]
    planned = plan_days(lesions, FIRST, 5)
    assert Counter(item.image_id for day in planned for item in day) == Counter(item.image_id for item in lesions)
    for number, day in enumerate(planned):
        assert {moment.date() for moment in times(day)} == {FIRST + timedelta(days=number)}
        assert all(8 <= moment.hour < 18 for moment in times(day)) and times(day) == sorted(times(day))
    days_of = {}
    for number, day in enumerate(planned):
        for item in day:
            days_of.setdefault(item.origin.get("patient_id", item.image_id), set()).add(number)
    assert all(len(days) == 1 for days in days_of.values())
    assert plan_days(lesions[::-1], FIRST, 5)[2][0].origin.keys() == planned[2][0].origin.keys()
    keys = [item.origin["idempotency_key"] for day in planned for item in day]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match="expected at least one for each of 40 days"):
        plan_days(lesions, FIRST, 40)


def test_a_later_date_brings_the_same_labels_and_more():
    answers = [Answer(f"i{n}", f"p{n}", datetime(2026, 3, 1, 9, tzinfo=UTC)) for n in range(400)]
    classes = {answer.image_id: "benign" for answer in answers[:390]}

    def labelled(days: int) -> dict[str, datetime]:
        until = datetime(2026, 3, 1, 9, tzinfo=UTC) + timedelta(days=days)
        return {answer.image_id: moment for answer, _, moment in due_labels(answers, classes, 5.0, 0.5, until)}

    early, late = labelled(5), labelled(1000)
    assert early.items() < late.items()
    assert 150 < len(late) < 240 and 0.5 < len(early) / len(late) < 0.75  # 1 - 1/e within the mean delay
    assert not set(late) & {answer.image_id for answer in answers[390:]}


def test_a_label_that_is_no_class_is_named(tmp_path):
    table = tmp_path / "m.csv"
    pd.DataFrame({"isic_id": ["a", "b"], "target": [1, 0], "dx": ["nv", "mel"]}).to_csv(table, index=False)
    assert read_classes(table, "target", ["benign", "malignant"]) == {"a": "malignant", "b": "benign"}
    assert read_classes(table, "dx", ["mel", "nv"]) == {"a": "nv", "b": "mel"}
    with pytest.raises(ValueError, match="dx of a is 'nv'; expected one of benign, malignant"):
        read_classes(table, "dx", ["benign", "malignant"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    # The bias makes the network call nothing malignant: it misses every cancer.
    return served_bundle(tmp_path_factory.mktemp("replay") / "bundle", onnx_bias=-50.0)


@pytest.fixture
def clinic(tmp_path):
    """Pictures and metadata of some patients."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    rows = [
        {"isic_id": f"ISIC_{number}", "patient_id": f"IP_{number // EACH}", "age_approx": 50.0, "target": number % 2}
        for number in range(PATIENTS * EACH)
    ]
    pd.DataFrame(rows).to_csv(folder / "m.csv", index=False)
    with h5py.File(folder / "i.hdf5", "w") as file:
        for number, row in enumerate(rows):
            file.create_dataset(row["isic_id"], data=np.bytes_(lesion_image(number)))
    return folder


def replay(url, clinic, verb, capsys, *arguments):
    images = ["--images", str(clinic / "i.hdf5")] if verb == "send" else []
    files = ["--metadata", str(clinic / "m.csv"), "--answers", str(clinic / "answers.csv")]
    status = main(["--url", url, "--clients", "2", verb, *images, *files, *arguments])
    said = capsys.readouterr()
    return status, json.loads(said.out.splitlines()[-1]) if said.out else {}, said.err


def test_days_are_replayed_once_and_labelled_when_their_labels_came(reference, clinic, dermray_home, capsys):
    local = LocalService(reference, dermray_home, ingress=IngressSettings(accept_replays=True))
    days = ["--start", FIRST.isoformat(), "--days", "3", "--device", "camera A"]
    with http_server(local) as url:
        status, result, _ = replay(url, clinic, "send", capsys, *days)
        assert (status, result["sent"], result["answered"]) == (0, 12, 12)
        rows = local.rows()
        assert Counter(datetime.fromtimestamp(row["received_at"] / 1e6, UTC).date() for row in rows) == {
            FIRST + timedelta(days=index): 4 for index in range(3)
        }
        assert {row["device"] for row in rows} == {"camera A"} and len({row["patient_hmac"] for row in rows}) == 6
        first = (clinic / "answers.csv").read_text()
        assert {line.prediction_id for line in read_answers(clinic / "answers.csv")} == {row["id"] for row in rows}
        assert replay(url, clinic, "send", capsys, *days)[0] == 0
        assert len(local.rows()) == 12 and (clinic / "answers.csv").read_text() == first

        assert replay(url, clinic, "label", capsys, "--until", "2026-03-01T00:00:00")[1] == {"labels": {}}
        for _ in range(2):
            status, result, _ = replay(url, clinic, "label", capsys, "--delay-days", "0.5")
            assert (status, result) == (0, {"labels": {"benign": 6, "malignant": 6}})
    alarms = [alarm for alarm in local.log.store.alarms() if alarm["kind"] == MISSED_CANCER]
    with (clinic / "answers.csv").open() as file:
        cancers = [row["prediction_id"] for row in csv.DictReader(file) if int(row["image_id"][5:]) % 2]
    assert sorted(alarm["detail"]["prediction_id"] for alarm in alarms) == sorted(cancers)


def test_a_service_that_takes_no_replays_is_named(reference, clinic, dermray_home, capsys):
    with http_server(LocalService(reference, dermray_home)) as url:
        status, result, error = replay(url, clinic, "send", capsys, "--start", "2026-03-01")
        assert status == 1 and result["answered"] == 0 and "ingress.accept_replays" in error
        status, _, error = replay("http://127.0.0.1:9", clinic, "send", capsys, "--start", "2026-03-01")
        assert status == 2 and error.startswith("replay: error:")
