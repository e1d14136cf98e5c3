"""A broken file is an error in one line; a broken row is quarantined with its reason and the others are kept."""

import numpy as np
import pandas as pd
import pytest

from data_pipelines.metadata_table import RESERVED_COLUMNS, read_metadata
from modeling.schema import TaskSpec

GOOD = {
    "isic_id": "ISIC_1",
    "patient_id": "IP_1",
    "target": "0",
    "age": "50.0",
    "diameter": "3.5",
    "sex": "male",
    "site": "head/neck",
    "attribution": "A clinic, somewhere",
}


def task(**changes) -> TaskSpec:
    fields = {
        "name": "binary",
        "fold_group": "patient_id",
        "context_group": "patient_id",
        "label_column": "target",
        "label_values": ["0", "1"],
        "classes": ["benign", "malignant"],
        "malignant": ["malignant"],
        "institution_column": "attribution",
        "columns": {
            "age": {"minimum": 0, "maximum": 120},
            "diameter": {},
            "sex": {"kind": "categorical", "categories": ["male", "female"]},
            "site": {"kind": "categorical"},
        },
    }
    return TaskSpec.model_validate(fields | changes)


def write(path, *rows: dict):
    """Each row is GOOD with changes; ids count up unless given."""
    table = [GOOD | {"isic_id": f"ISIC_{number}"} | changes for number, changes in enumerate(rows)]
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def test_good_rows_keep_text_as_text_and_missing_as_missing(tmp_path):
    path = write(tmp_path / "m.csv", {"isic_id": "007"}, {"age": "", "site": "", "diameter": "1e-29", "target": "1.0"})
    table, quarantine = read_metadata(path, task(), require_labels=True)
    assert quarantine == []
    assert table["id"].tolist() == ["007", "ISIC_1"] and table["group"].tolist() == ["IP_1", "IP_1"]
    assert table["label"].tolist() == [0, 1] and table["label"].dtype == np.int64
    assert table["diameter"].tolist() == [3.5, 1e-29] and table["age"].isna().tolist() == [False, True]
    assert table["site"].isna().tolist() == [False, True]
    assert list(table.columns) == [
        "id", "group", "context", "label", "age", "diameter", "sex", "site", "attribution",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason", "shown"),
    [
        ({"isic_id": ""}, "id_missing", "row 2"),
        ({"patient_id": ""}, "group_missing", "patient_id"),
        ({"target": ""}, "label_missing", "target"),
        ({"target": "nan"}, "label_missing", "target"),
        ({"target": "2"}, "label_unknown", "'2'"),
        ({"age": "190"}, "out_of_range", "age = 190; expected 0 to 120"),
        ({"age": "-1"}, "out_of_range", "age = -1"),
        ({"diameter": "inf"}, "out_of_range", "diameter = inf"),
        ({"age": "about 50"}, "not_a_number", "age = 'about 50'"),
        ({"sex": "m"}, "category_unknown", "sex = 'm'"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason_and_costs_no_other(changes, reason, shown, tmp_path):
    path = write(tmp_path / "m.csv", {}, changes, {})
    table, quarantine = read_metadata(path, task(), require_labels=True)
    assert table["id"].tolist() == ["ISIC_0", "ISIC_2"]
    assert [(bad.id, bad.reason) for bad in quarantine] == [(changes.get("isic_id", "ISIC_1"), reason)]
    assert shown in quarantine[0].detail


def test_a_repeated_row_is_kept_once_and_contradicting_rows_not_at_all(tmp_path):
    same, contradicting = {"isic_id": "ISIC_5"}, {"isic_id": "ISIC_6"}
    path = write(tmp_path / "m.csv", same, same, contradicting, contradicting | {"target": "1"}, {})
    table, quarantine = read_metadata(path, task(), require_labels=True)
    assert table["id"].tolist() == ["ISIC_5", "ISIC_4"]
    assert [bad.id for bad in quarantine] == ["ISIC_5", "ISIC_6", "ISIC_6"]
    assert {bad.reason for bad in quarantine} == {"duplicate_id"}


def test_one_hot_labels_need_exactly_one_one(tmp_path):
    one_hot = task(label_column=None, label_values=None, label_columns=["NV", "MEL"], institution_column=None)
    values = [("1.0", "0.0"), ("0", "1"), ("0", "0"), ("1", "1"), ("", "1"), ("0.5", "1")]
    path = write(tmp_path / "m.csv", *({"NV": a, "MEL": b} for a, b in values))
    table, quarantine = read_metadata(path, one_hot, require_labels=True)
    assert table["label"].tolist() == [0, 1]
    assert [bad.reason for bad in quarantine] == ["label_missing", "label_unknown", "label_missing", "label_unknown"]


def test_all_missing_columns_are_named_at_once(tmp_path):
    path = tmp_path / "m.csv"
    pd.DataFrame([GOOD]).drop(columns=["age", "target"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"lacks columns \['target', 'age'\]"):
        read_metadata(path, task(), require_labels=True)


def test_a_table_to_score_needs_no_label_group_or_institution(tmp_path):
    path = tmp_path / "m.csv"
    pd.DataFrame([GOOD]).drop(columns=["target", "attribution"]).to_csv(path, index=False)
    table, quarantine = read_metadata(path, task(), require_labels=False)
    assert quarantine == [] and "label" not in table and table["context"].tolist() == ["IP_1"]
    pd.DataFrame([GOOD]).drop(columns=["patient_id"]).to_csv(path, index=False)
    table, _ = read_metadata(path, task(context_group=None), require_labels=False)
    assert table["group"].tolist() == ["ISIC_1"] and table["context"].tolist() == [""]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as CSV"),
        (b"\x89HDF\r\n\x1a\n\x00\xff\xfe", "cannot be read as CSV"),
        (b"isic_id,patient_id\n1,2\n1,2,3,4\n", "lacks columns"),
        ((",".join(GOOD) + "\n" + ",".join("x" * 30) + "\n").encode(), "more fields than its header"),
        ((",".join(GOOD) + "\n" + "1,2,0,5,3,male,x,y\n1,2,0,5,3,male,x,a clinic, here\n").encode(), "line 3, saw 9"),
        ((",".join(GOOD) + "\n").encode(), "no rows"),
        ((",".join(GOOD) + "\n").encode() + b"ISIC_1,IP_1,0,50,3,male,Cl\xednic,x\n", "cannot be read as CSV"),
    ],
)
def test_an_unreadable_file_is_one_clear_line(content, says, tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_metadata(path, task(), require_labels=True)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_metadata(tmp_path / "absent.csv", task(), require_labels=True)
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        read_metadata(tmp_path, task(), require_labels=True)


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_a_feature_cannot_take_the_name_of_a_prepared_column(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        read_metadata(write(tmp_path / "m.csv", {}), task(columns={name: {}}), require_labels=True)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path / "m.csv", {})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_metadata(path, task(), require_labels=True)[0]) == 1
