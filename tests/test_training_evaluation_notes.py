"""What a report says about data that cannot show something; what no model can be made of is refused at once."""

import numpy as np
import pytest

from data_pipelines.image_dataset import DatasetVersion
from tests.small_population import BINARY, GATE, lesions
from training.evaluation_notes import check_trainable, evaluation_notes


def version(folder, table):
    return DatasetVersion(folder, BINARY, "d" * 64, None, table.reset_index(drop=True), 3)


def test_a_renamed_copy_of_the_label_is_named_wherever_metadata_are_read(tmp_path):
    table = lesions()
    table["age"] = 50.0 - table["label"]
    spoilt = version(tmp_path, table)
    assert evaluation_notes(spoilt, "image_only") == []
    for context in ("none", "patient"):
        assert evaluation_notes(spoilt, context) == [
            "Column age alone tells malignant from benign with AUC 1.000: it may leak the label."
        ]


def test_labels_of_the_gate_split_are_not_looked_at_for_leaks(tmp_path):
    table = lesions()
    table["age"] = np.where(table["fold"] == GATE, 50.0 - table["label"], table["age"])
    assert evaluation_notes(version(tmp_path, table), "patient") == []


@pytest.mark.parametrize("ids", ["each its own", "none"])
def test_lesions_that_all_stand_alone_are_pointed_out_where_patients_are_compared(tmp_path, ids):
    table = lesions()
    table["context"] = table["id"] if ids == "each its own" else ""
    assert evaluation_notes(version(tmp_path, table), "none") == []
    assert "Every patient has one training lesion" in evaluation_notes(version(tmp_path, table), "patient")[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[t["fold"] >= 0], "its gate split has no row"),
        (lambda t: t.assign(label=np.where(t["fold"] == GATE, t["label"], 0)), "0 of its 270 training rows are mal"),
        (lambda t: t.assign(label=np.where(t["fold"] == GATE, t["label"], 1)), "270 of its 270 training rows are mal"),
        (lambda t: t[t["fold"] <= 0], "1 folds have rows; expected at least 2"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused_before_anything_trains(tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as error:
        check_trainable(version(tmp_path, change(lesions())))
    assert "\n" not in str(error.value)
