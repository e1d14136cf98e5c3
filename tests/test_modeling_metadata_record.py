"""Metadata of one request: what passes, and that every refusal names field, value and expectation in one line."""

import json

import pytest

from modeling.metadata_record import clean_record
from modeling.schema import ColumnSpec, TaskSpec

TASK = TaskSpec(
    name="sample",
    fold_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={
        "age": ColumnSpec(minimum=0, maximum=120),
        "size_mm": ColumnSpec(minimum=0),
        "a": ColumnSpec(),
        "sex": ColumnSpec(kind="categorical", categories=["female", "male"]),
        "site": ColumnSpec(kind="categorical"),
    },
)


def test_a_full_record_comes_back_in_column_order_with_floats():
    cleaned = clean_record(TASK, {"site": "left ear", "sex": "male", "age": 45, "size_mm": 3.5, "a": -1.5})
    assert list(cleaned) == list(TASK.columns)
    assert cleaned == {"age": 45.0, "size_mm": 3.5, "a": -1.5, "sex": "male", "site": "left ear"}
    assert type(cleaned["age"]) is float


@pytest.mark.parametrize("metadata", [{}, {"age": None, "sex": None}])
def test_absent_and_null_fields_are_missing(metadata):
    assert clean_record(TASK, metadata) == dict.fromkeys(TASK.columns)


def test_bounds_are_inclusive():
    assert clean_record(TASK, {"age": 0})["age"] == 0.0
    assert clean_record(TASK, {"age": 120})["age"] == 120.0


@pytest.mark.parametrize(
    ("metadata", "field", "value", "expected"),
    [
        ({"age": 121}, "'age'", "121", "a number from 0 to 120"),
        ({"age": -0.1}, "'age'", "-0.1", "a number from 0 to 120"),
        ({"size_mm": -3}, "'size_mm'", "-3", "a number of at least 0"),
        ({"age": "45"}, "'age'", "'45'", "a number from 0 to 120"),
        ({"age": True}, "'age'", "True", "a number from 0 to 120"),
        ({"age": [45]}, "'age'", "[45]", "a number from 0 to 120"),
        ({"a": float("nan")}, "'a'", "nan", "a finite number"),
        ({"a": float("-inf")}, "'a'", "-inf", "a finite number"),
        ({"a": 10**400}, "'a'", "over 30 digits", "a finite number"),
        ({"sex": "Male"}, "'sex'", "'Male'", "['female', 'male']"),
        ({"sex": 1}, "'sex'", "1", "['female', 'male']"),
        ({"sex": ["male"]}, "'sex'", "['male']", "['female', 'male']"),
        ({"site": ""}, "'site'", "''", "text of 1 to 200 characters"),
        ({"site": 3}, "'site'", "3", "text of 1 to 200 characters"),
        ({"site": False}, "'site'", "False", "text of 1 to 200 characters"),
        ({"site": "x" * 5000}, "'site'", "'xxx", "text of 1 to 200 characters"),
        ({"ages": 45}, "'ages'", "45", "age, size_mm, a, sex, site"),
        ({"a\nb" * 500: {"deep": 1}}, "'a\\nb", "{'deep': 1}", "age, size_mm"),
    ],
)
def test_refusals_name_field_value_and_expectation_in_one_short_line(metadata, field, value, expected):
    with pytest.raises(ValueError) as caught:
        clean_record(TASK, metadata)
    message = str(caught.value)
    assert field in message and value in message and expected in message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize("metadata", [[], "age", 3, None])
def test_metadata_must_be_an_object(metadata):
    with pytest.raises(ValueError, match="expected a JSON object"):
        clean_record(TASK, metadata)


def test_python_json_constants_do_not_slip_through():
    with pytest.raises(ValueError, match="'age' is nan"):
        clean_record(TASK, json.loads('{"age": NaN}'))


def test_label_columns_are_unknown_fields():
    with pytest.raises(ValueError, match="'target' is unknown"):
        clean_record(TASK, {"target": 1})
