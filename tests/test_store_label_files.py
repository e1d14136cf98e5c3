"""Labels from files, Label Studio's exports and CSV: every entry is a label or a listed problem."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from store.label_files import read_csv_labels, read_label_studio
from store.label_studio import label_task, labelling_config, suggested_class
from store.label_tasks import LabelTask
from tests.tiny_bundle import tiny_task

TASK = tiny_task()
AT = "2024-05-03T10:12:00.123456Z"
AT_US = 1_714_731_120_123_456


def annotation(number=5, choice="malignant", **values):
    results = [{"from_name": "class", "to_name": "lesion", "type": "choices", "value": {"choices": [choice]}}]
    base = {"id": number, "completed_by": 1, "result": results, "was_cancelled": False}
    return base | {"created_at": "2024-05-01T00:00:00Z", "updated_at": AT, "lead_time": 3.5, "project": 2} | values


def exported(*given, prediction_id="p", **values):
    return [{"id": 9, "data": {"prediction_id": prediction_id}, "annotations": list(given), "drafts": [], **values}]


def read(content, labellers=None):
    return read_label_studio(json.dumps(content).encode(), TASK, "main", labellers or {})


def test_json_and_json_min_of_one_annotation_are_one_label():
    comment = {"from_name": "comment", "to_name": "lesion", "type": "textarea", "value": {"text": ["two", "lines"]}}
    given = annotation()
    given["result"].append(comment)
    (whole,) = read(exported(given)).labels
    flat = {"id": 9, "prediction_id": "p", "class": "malignant", "comment": "two\nlines", "annotator": 1}
    (short,) = read([{**flat, "annotation_id": 5, "created_at": AT, "updated_at": AT, "lead_time": 3.5}]).labels
    assert whole.label == short.label
    label = whole.label
    assert (label.prediction_id, label.label, label.malignant, label.labelled_at) == ("p", "malignant", True, AT_US)
    assert (label.source, label.external_id, label.comment) == ("label_studio", f"main/5@{AT_US}", "two\nlines")
    assert label.labeller == "main user 1"


@pytest.mark.parametrize(
    ("by", "name"),
    [(1, "Dr Weber"), (2, "main user 2"), ({"id": 3, "email": "a@b.org"}, "Ada"), ("x@y.org", "x@y.org")],
)
def test_an_annotator_gets_a_name(by, name):
    found = read(exported(annotation(completed_by=by)), {"1": "Dr Weber", "a@b.org": "Ada"})
    assert found.labels[0].label.labeller == name


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        (exported(annotation(was_cancelled=True)), "cancelled", "skipped"),
        (exported(annotation(choice="wart")), "unknown_class", "'wart'; expected one of benign, malignant"),
        (exported(annotation(result=[])), "malformed", "class is None; expected one choice"),
        (exported(annotation(result="x")), "malformed", "class is None"),
        (exported(annotation(number=None)), "malformed", "id is None"),
        (exported(annotation(number=10**300)), "malformed", "id is 1000"),
        (exported(annotation(number=-1)), "malformed", "id is -1; expected a number"),
        (exported(annotation(updated_at="yesterday")), "malformed", "updated_at is 'yesterday'"),
        (exported(annotation(updated_at="2999-01-01T00:00:00Z")), "in_future", "clock"),
        (exported(annotation(completed_by=None)), "malformed", "labeller is None"),
        (exported(annotation(), prediction_id=None), "malformed", "prediction_id is None"),
        (exported(annotation(), prediction_id="a b"), "malformed", "prediction_id is 'a b'"),
        (exported(None), "malformed", "id is None"),
        ([{"annotation_id": 4, "annotator": 1, "updated_at": AT, "prediction_id": "p"}], "malformed", "class"),
    ],
)
def test_what_is_no_label_is_listed_with_its_reason_and_the_rest_is_read(content, reason, says):
    found = read([*content, *exported(annotation(number=77))])
    (problem,) = found.problems
    assert problem.reason == reason and says in problem.detail and "\n" not in problem.detail
    assert [item.place for item in found.labels] == ["annotation 77"]


@pytest.mark.parametrize("content", [{}, "text", [1], [{"data": {}}], None])
def test_what_is_no_export_is_refused(content):
    with pytest.raises(ValueError, match="expected a JSON list|neither a task"):
        read(content)
    with pytest.raises(ValueError, match="not JSON"):
        read_label_studio(b"\xff", TASK, "main", {})


def test_a_label_and_a_problem_say_which_task_they_are_of():
    flat = {"id": 9, "annotation_id": 5, "prediction_id": "p", "annotator": 1, "created_at": AT}
    for content in (exported(annotation()), [{**flat, "class": "benign"}]):
        assert [item.task for item in read(content).labels] == [9]
    for content in (exported(annotation(choice="wart")), [flat]):
        assert [problem.task for problem in read(content).problems] == [9]
    assert read(exported(annotation(), id="nine")).labels[0].task is None


def test_more_annotations_than_asked_for_are_refused():
    content = json.dumps(exported(annotation(1), annotation(2), annotation(3, "wart"))).encode()
    assert len(read_label_studio(content, TASK, "main", {}, most=3).labels) == 2
    with pytest.raises(ValueError, match="more than 2 annotations"):
        read_label_studio(content, TASK, "main", {}, most=2)


@pytest.mark.parametrize("depth", [900, 960, 980, 990, 1000, 100_000])
def test_lists_in_lists_are_a_listed_problem_or_no_json(depth):
    content = json.dumps(exported(annotation(number="here"))).replace('"here"', "[" * depth + "]" * depth)
    try:
        (problem,) = read_label_studio(content.encode(), TASK, "main", {}).problems
        found = problem.detail
    except ValueError as error:
        found = str(error)
    assert found.startswith(("id is [[", "not JSON: ")) and len(found) < 200


def test_a_labellers_later_annotation_comes_last_whatever_the_files_order():
    late, early = annotation(number=1), annotation(number=2, updated_at="2024-05-02T00:00:00Z")
    assert [item.place for item in read(exported(late, early)).labels] == ["annotation 2", "annotation 1"]


HEADER = "prediction_id,label,labeller,labelled_at,confidence,comment"


def csv_of(*lines, header=HEADER):
    return ("\n".join([header, *lines]) + "\n").encode()


def test_a_csv_gives_labels_known_by_their_content():
    row = 'p,malignant,Dr Weber,2024-05-03T10:12:00.123456,0.9,"histology, twice"'
    (first,) = read_csv_labels(csv_of(row), TASK).labels
    (second,) = read_csv_labels(csv_of("", row.replace("0.9", "0.90")), TASK).labels
    assert first.label == second.label and (first.place, second.place) == ("line 2", "line 3")
    label = first.label
    assert (label.labelled_at, label.confidence, label.comment) == (AT_US, 0.9, "histology, twice")
    (third,) = read_csv_labels(csv_of(row + ",yes", header=HEADER + ",adjudication"), TASK).labels
    assert third.label.adjudication and third.label.external_id != label.external_id


@pytest.mark.parametrize(
    ("line", "reason", "says"),
    [
        ("p,wart,x,2024-05-03,,", "unknown_class", "'wart'"),
        ("p,benign,,2024-05-03,,", "malformed", "labeller is ''"),
        ("p,benign,x,,,", "malformed", "labelled_at is ''"),
        ("p,benign,x,2024-05-03,1.5,", "malformed", "confidence is '1.5'"),
        ("p,benign,x,2024-05-03,nan,", "malformed", "confidence is 'nan'"),
        ("p,benign,x", "malformed", "3 values; expected 6"),
        ("p,benign,a\x00b,2024-05-03,,", "malformed", "labeller"),
    ],
)
def test_a_csv_row_that_is_no_label_is_listed(line, reason, says):
    found = read_csv_labels(csv_of(line, "q,benign,x,2024-05-03,,"), TASK)
    (problem,) = found.problems
    assert (problem.place, problem.reason) == ("line 2", reason) and says in problem.detail
    assert [item.label.prediction_id for item in found.labels] == ["q"]


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", csv_of(header="prediction_id,label"), csv_of(header=HEADER + ",age"), b'a,"b']
)
def test_what_is_no_csv_of_labels_is_refused(data):
    with pytest.raises(ValueError, match="columns|not CSV"):
        read_csv_labels(data, TASK)


def task_row(**values):
    base = {"id": "p", "received_at": AT_US, "model_version": "3", "metadata": {"age_approx": 60.0, "sex": None}}
    base |= {"class_probabilities": {"benign": 0.9, "malignant": 0.1}, "risk": 0.1, "threshold": 0.05}
    return base | {"abstained": False, "image_hash": "a" * 64, "suffix": ".jpg"} | values


def test_the_suggestion_is_on_the_models_side_of_the_threshold(many_classes):
    probabilities = {"nv": 0.8, "mel": 0.05, "bcc": 0.15}
    assert suggested_class(task_row(class_probabilities=probabilities, risk=0.2), many_classes) == "bcc"
    assert suggested_class(task_row(class_probabilities=probabilities, risk=0.01), many_classes) == "nv"
    assert suggested_class(task_row(abstained=True, risk=None), many_classes) is None


def test_a_task_is_what_label_studio_imports_and_its_names_are_the_configs():
    made = label_task(LabelTask(task_row(), "random"), "http://x/p", TASK, True, False)
    assert made["data"] == {
        "image": "http://x/p",
        "prediction_id": "p",
        "received_at": "2024-05-03T10:12:00+00:00",
        "model_version": "3",
        "selected_by": "random",
    }
    (prediction,) = made["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("3", 0.1)
    assert prediction["result"][0]["value"] == {"choices": ["malignant"]}
    view = ElementTree.fromstring(labelling_config(TASK))
    choices = view.find("Choices")
    assert choices.get("name") == prediction["result"][0]["from_name"]
    assert choices.get("toName") == prediction["result"][0]["to_name"] == view.find("Image").get("name")
    assert [choice.get("value") for choice in choices] == ["benign", "malignant"]
    assert "Synthetic" in view.find("Header").get("value")
    hidden = label_task(LabelTask(task_row(), "random"), "http://x/p", TASK, False, True)
    assert "predictions" not in hidden and hidden["data"]["metadata"] == {"age_approx": 60.0}
