"""Label Studio and back: tasks for experts out of the log, their labels into it, once each."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sql

from monitoring.prediction_log import PredictionLog, PredictionRecord
from ray_jobs.export_label_tasks import ExportLabelTasksConfig
from ray_jobs.export_label_tasks import run as export
from ray_jobs.import_labels import ImportLabelsConfig
from ray_jobs.import_labels import run as import_file
from ray_jobs.job import parse_config
from store import labels as label_store
from store.image_files import prepare_image
from store.label_consensus import truths_of
from store.labels import NewLabel, add_label
from store.tables import labels
from tests.bundle_factory import lesion_image
from tests.label_studio import annotated
from tests.tiny_bundle import tiny_bundle

THRESHOLD = 0.05
DAY_US = 86_400_000_000
START = 1_714_521_600_000_000  # 2024-05-01
RISKS = [0.001, 0.002, 0.004, 0.03, 0.049, 0.051, 0.08, 0.3, 0.6, 0.9]


@pytest.fixture
def log(dermray_home):
    """Ten predictions, one a day; the first two of 2024-05-01 and -02 show the same picture."""
    made = PredictionLog(
        f"sqlite:///{dermray_home}/store.db", str(dermray_home / "images"), str(dermray_home / "spool")
    )
    for number, risk in enumerate(RISKS):
        picture = prepare_image(lesion_image(max(number, 1)))
        record = PredictionRecord(
            id=f"p{number}",
            received_at=START + number * DAY_US,
            model_version="7",
            context="none",
            patient_hmac="ab" * 32,
            institution="clinic X",
            metadata={"age_approx": 50.0},
            image_hash=picture.hash,
            risk=risk,
            threshold=THRESHOLD,
            band="high" if risk > 0.5 else "low",
            class_probabilities={"benign": 1 - risk, "malignant": risk},
        )
        made.write([record], {picture.hash: picture.data})
    return made


@pytest.fixture
def bundle(tmp_path):
    tiny_bundle(tmp_path / "bundle", contexts=["image_only", "none"])
    return str(tmp_path / "bundle")


def exported(bundle, home, **values):
    result = export(ExportLabelTasksConfig(bundle=bundle, **values))
    return result, json.loads((home / "label-tasks" / "tasks.json").read_text())


def ids(tasks, by=None):
    return [task["data"]["prediction_id"] for task in tasks if by in (None, task["data"]["selected_by"])]


def rows(log):
    with log.store.reading() as connection:
        return [dict(row) for row in connection.execute(sql.select(labels).order_by(labels.c.id)).mappings()]


def test_tasks_are_those_nearest_to_the_threshold_and_a_random_sample(log, bundle, dermray_home):
    result, tasks = exported(bundle, dermray_home, num_tasks=6)
    assert ids(tasks, "uncertain") == ["p4", "p5", "p6"] and len(ids(tasks, "random")) == 3
    assert len(set(ids(tasks))) == 6 and result["available"] == 10
    again = exported(bundle, dermray_home, num_tasks=6)
    assert again == (result, tasks)
    draws = {tuple(ids(exported(bundle, dermray_home, num_tasks=3, uncertain_share=0.0, seed=s)[1])) for s in range(6)}
    assert len(draws) > 1
    assert len(exported(bundle, dermray_home, num_tasks=50)[1]) == 10
    text = json.dumps(tasks)
    assert "abab" not in text and "clinic X" not in text and "age_approx" not in text
    assert tasks[0]["data"]["image"].startswith("http://127.0.0.1:8000/v1/predictions/p")


def test_filters_choose_among_predictions(log, bundle, dermray_home):
    add_label(log.store, NewLabel("p0", "benign", False, "a"), "x")
    add_label(log.store, NewLabel("p1", "benign", False, "a"), "x")
    add_label(log.store, NewLabel("p1", "malignant", True, "b"), "x")
    assert len(exported(bundle, dermray_home)[1]) == 8
    assert ids(exported(bundle, dermray_home, label_state="disagreed")[1]) == ["p1"]
    assert ids(exported(bundle, dermray_home, label_state="single")[1]) == ["p0"]
    assert ids(exported(bundle, dermray_home, band="high")[1]) == ["p8", "p9"]
    window = {"since": "2024-05-03", "until": "2024-05-05T00:00:00Z"}
    assert ids(exported(bundle, dermray_home, **window)[1]) == ["p2", "p3"]
    assert ids(exported(bundle, dermray_home, model_version="8")[1]) == []


def test_label_studio_may_read_the_image_store_itself(log, bundle, dermray_home):
    _, tasks = exported(bundle, dermray_home, images="files", document_root=str(dermray_home), num_tasks=1)
    place = tasks[0]["data"]["image"].removeprefix("/data/local-files/?d=")
    assert (dermray_home / place).is_file() and place.startswith("images/")
    with pytest.raises(ValueError, match="does not hold the images"):
        ExportLabelTasksConfig(bundle=bundle, images="files", document_root=str(dermray_home / "other"))
    _, tasks = exported(bundle, dermray_home, images="files", images_url="s3://bucket/images", num_tasks=1)
    assert tasks[0]["data"]["image"].startswith("s3://bucket/images/")


def test_flags_take_dates_and_refuse_what_is_none():
    config = parse_config(ExportLabelTasksConfig, ["--since", "2024-05-01", "--until", "2024-05-02T00:00:00+02:00"])
    assert (config.since, config.until) == (START, START + 22 * 3_600_000_000)
    with pytest.raises(ValueError, match="expected a date"):
        parse_config(ExportLabelTasksConfig, ["--since", "May"])
    with pytest.raises(ValueError, match="until is not after since"):
        parse_config(ExportLabelTasksConfig, ["--since", "2024-05-02", "--until", "2024-05-02"])


@pytest.fixture
def send(bundle, tmp_path):
    def send_file(content, name="export.json", **values):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return import_file(ImportLabelsConfig(file=str(file), bundle=bundle, **values))

    return send_file


def test_tasks_go_out_and_come_back_as_labels_once(log, bundle, dermray_home, send):
    _, tasks = exported(bundle, dermray_home, num_tasks=50)
    content = annotated(tasks)
    first = send(content)
    assert (first["added"], first["known"], first["refused"]) == (10, 0, {})
    # Five risks lie below the threshold: cancers that the model missed, each an alarm, once.
    assert first["alarms"] == 5 == len(log.store.alarms())
    before = rows(log)
    again = send(content)
    assert (again["added"], again["known"], again["alarms"]) == (0, 10, 0) and rows(log) == before
    assert send(annotated(tasks[:1], "benign", by=2, first=500))["added"] == 1
    assert truths_of(log.store, [ids(tasks)[0]])[ids(tasks)[0]].state == "disagreed"


def test_an_edited_annotation_supersedes_and_an_old_export_undoes_nothing(log, bundle, dermray_home, send):
    _, tasks = exported(bundle, dermray_home, num_tasks=1)
    old, new = annotated(tasks), annotated(tasks, "benign", at="2024-06-02T00:00:00Z")
    older = annotated(tasks, "malignant", at="2024-05-30T00:00:00Z")
    assert send(old)["added"] == 1 and send(new)["added"] == 1
    for stale, what in ((old, "known"), (older, "outdated")):
        assert send(stale)[what] == 1
    stored = rows(log)
    assert [row["label"] for row in stored] == ["malignant", "benign"] and stored[1]["supersedes"] == stored[0]["id"]


def test_what_cannot_be_stored_is_reported_and_the_rest_goes_in(log, send):
    data = {"prediction_id": "never-made"}
    known = annotated([{"data": {"prediction_id": "p1"}}])
    unknown = annotated([{"data": data}, {"data": {"prediction_id": "p1.shadow"}}], first=200)
    wart = annotated([{"data": {"prediction_id": "p2"}}], "wart", first=300)
    skipped = annotated([{"data": {"prediction_id": "p3"}}], first=400)
    skipped[0]["annotations"][0]["was_cancelled"] = True
    result = send([*known, *unknown, *wart, *skipped])
    assert result["added"] == 1
    assert result["refused"] == {"cancelled": 1, "unknown_class": 1, "unknown_prediction": 2}
    report = json.loads(open(result["report"]).read())
    listed = {(problem["place"], problem["reason"]) for problem in report["problems"]}
    assert listed == {
        ("annotation 200", "unknown_prediction"),
        ("annotation 201", "unknown_prediction"),
        ("annotation 300", "unknown_class"),
        ("annotation 400", "cancelled"),
    }
    for content, says in ((wart, "none of 1 entries is a label"), ("{", "not JSON"), ({}, "expected a JSON list")):
        with pytest.raises(ValueError, match=says):
            send(content)


def test_a_csv_settles_a_disagreement(log, send):
    header = "prediction_id,label,labeller,labelled_at,confidence,comment,adjudication"
    lines = [
        "p5,malignant,Dr A,2024-06-01,0.9,,",
        "p5,benign,Dr B,2024-06-02,,looks fine,no",
        "p5,malignant,Dr A,2024-06-03,,,yes",
        "p5,malignant,pathology,2024-06-04,1,histology,yes",
    ]
    result = send("\n".join([header, *lines]), "labels.csv")
    assert (result["added"], result["refused"]) == (3, {"reader_adjudicates": 1})
    truth = truths_of(log.store, ["p5"])["p5"]
    assert (truth.state, truth.label, truth.readers) == ("adjudicated", "malignant", 2)
    assert send("\n".join([header, *lines]), "renamed.csv")["known"] == 3


@pytest.mark.slow
def test_an_import_killed_at_any_label_goes_on_where_it_stopped(log, bundle, dermray_home, send, monkeypatch):
    _, tasks = exported(bundle, dermray_home, num_tasks=50)
    # The first ones lie above the threshold and raise no alarm.
    content = annotated(tasks)[::-1]
    insert = label_store._missed_cancer_alarm

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(label_store, "_missed_cancer_alarm", killed)
    with pytest.raises(KeyboardInterrupt):
        send(content)
    partly = len(rows(log))
    assert 0 < partly < 10
    monkeypatch.setattr(label_store, "_missed_cancer_alarm", insert)
    result = send(content)
    assert (result["added"], result["known"]) == (10 - partly, partly)
    assert len(rows(log)) == 10 and len(log.store.alarms()) == 5
