"""Fusion features: the same for one row and for many, missing stays missing, patients do not mix."""

import numpy as np
import pandas as pd
import pytest

from modeling.calibration import log_softmax
from modeling.metadata_features import DERIVED, FeatureSpec
from modeling.schema import ColumnSpec, TaskSpec

TASK = TaskSpec(
    name="sample",
    fold_group="patient_id",
    context_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={
        "age_approx": ColumnSpec(),
        "tbp_lv_A": ColumnSpec(),
        "tbp_lv_Aext": ColumnSpec(),
        "clin_size_long_diam_mm": ColumnSpec(),
        "sex": ColumnSpec(kind="categorical", categories=["male", "female"]),
        "site": ColumnSpec(kind="categorical"),
    },
    site_column="site",
)
COLUMNS = {
    "age_approx": [50, 50.0, None, 60, 60, 60],
    "tbp_lv_A": [2.0, 4.0, 6.0, 1.0, 2.0, np.nan],
    "tbp_lv_Aext": [1.0, 2.0, 0.0, 2.0, 2.0, 2.0],
    "clin_size_long_diam_mm": [3.0, 3.0, 3.0, 5.0, 5.0, 9.0],
    "sex": ["male", "male", None, "female", "other", "female"],
    "site": ["arm", "leg", "arm", "arm", "", "leg"],
}
PATIENTS = ["p1", "p1", "p1", "p2", "p2", None]
IMAGE = log_softmax(np.array([[0, 1.0], [0, 2], [0, 3], [0, -1], [0, -1], [0, 9]]))


def _build(context, columns=COLUMNS, image=IMAGE, groups=PATIENTS, has_image=True):
    spec = FeatureSpec.fit(context, TASK, COLUMNS, has_image=has_image)
    matrix, names = spec.build(columns, image, groups if context == "patient" else None, context)
    assert matrix.dtype == np.float32 and matrix.shape == (len(matrix), len(names)) and len(set(names)) == len(names)
    return {name: matrix[:, i] for i, name in enumerate(names)}


def test_own_features_hold_values_codes_ratios_and_the_image_logit():
    features = _build("none")
    np.testing.assert_array_equal(features["age_approx"], [50, 50, np.nan, 60, 60, 60])
    np.testing.assert_array_equal(features["sex"], [0, 0, np.nan, 1, np.nan, 1])
    np.testing.assert_array_equal(features["site"], [0, 1, 0, 0, np.nan, 1])
    np.testing.assert_array_equal(features["a_ratio"], [2, 2, np.nan, 0.5, 1, np.nan])
    np.testing.assert_allclose(features["image_malignant_logit"], [1, 2, 3, -1, -1, 9], rtol=1e-6)
    assert "shape_index" not in features  # its columns are not in the task
    assert not any(name.startswith(("patient_", "site_")) for name in features)


def test_patient_features_compare_with_the_same_patient_and_site():
    features = _build("patient")
    np.testing.assert_allclose(features["patient_z_tbp_lv_A"], [-1.2247449, 0, 1.2247449, -1, 1, np.nan], rtol=1e-6)
    np.testing.assert_allclose(features["site_z_tbp_lv_A"], [-1, 0, 1, 0, 0, np.nan])
    np.testing.assert_allclose(features["patient_rank_image_malignant_logit"], [1 / 6, 0.5, 5 / 6, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(features["site_rank_image_malignant_logit"], [0.25, 0.5, 0.75, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(features["patient_z_clin_size_long_diam_mm"], 0)


def test_a_refused_lesion_shifts_no_other_lesions_image_rank_and_keeps_its_place_in_the_metadata():
    trusted = np.array([True, False, True, True, True, True])
    spec = FeatureSpec.fit("patient", TASK, COLUMNS)
    matrix, names = spec.build(COLUMNS, IMAGE, PATIENTS, trusted=trusted)
    features, all_count = {name: matrix[:, i] for i, name in enumerate(names)}, _build("patient")
    alone, _ = spec.build(
        {name: np.array(values, object)[trusted] for name, values in COLUMNS.items()}, IMAGE[trusted], [*"ppqqr"]
    )
    for name, values in features.items():
        if name.endswith("image_malignant_logit") and name != "image_malignant_logit":
            assert np.isnan(values[1])
            np.testing.assert_array_equal(values[trusted], alone[:, names.index(name)])
        else:
            np.testing.assert_array_equal(values, all_count[name])
    assert not np.array_equal(features["patient_z_image_malignant_logit"], all_count["patient_z_image_malignant_logit"])


def test_one_patient_alone_gets_the_features_it_had_among_others():
    everyone = FeatureSpec.fit("patient", TASK, COLUMNS)
    matrix, _ = everyone.build(COLUMNS, IMAGE, PATIENTS)
    first = {name: values[:3] for name, values in COLUMNS.items()}
    alone, _ = everyone.build(first, IMAGE[:3], PATIENTS[:3])
    np.testing.assert_array_equal(alone, matrix[:3])


def test_a_single_request_gets_the_features_of_the_batch():
    spec = FeatureSpec.fit("none", TASK, COLUMNS)
    matrix, _ = spec.build(COLUMNS, IMAGE)
    for row in range(6):
        single, _ = spec.build({name: [values[row]] for name, values in COLUMNS.items()}, IMAGE[row : row + 1])
        np.testing.assert_array_equal(single[0], matrix[row])


def test_data_frames_and_lists_give_the_same_matrix():
    spec = FeatureSpec.fit("none", TASK, COLUMNS)
    frame = pd.DataFrame(COLUMNS).assign(unrelated="x")
    np.testing.assert_array_equal(spec.build(frame, IMAGE)[0], spec.build(COLUMNS, IMAGE)[0])
    assert FeatureSpec.fit("none", TASK, frame) == spec
    nullable = frame.convert_dtypes()  # pandas' own NA
    np.testing.assert_array_equal(spec.build(nullable, IMAGE)[0], spec.build(COLUMNS, IMAGE)[0])


@pytest.mark.parametrize("columns", [None, {}, {name: [None] * 6 for name in COLUMNS}])
@pytest.mark.parametrize("context", ["none", "patient"])
def test_without_metadata_only_the_image_features_are_known(context, columns):
    features = _build(context, columns=columns)
    known = {name for name, values in features.items() if not np.isnan(values).all()}
    assert known == {name for name in features if "image" in name}


def test_listed_categories_are_fixed_and_others_are_learned():
    spec = FeatureSpec.fit("none", TASK, COLUMNS)
    assert spec.categories == {"sex": ["male", "female"], "site": ["arm", "leg"]}
    unseen = COLUMNS | {"site": ["scalp"] * 6}
    assert np.isnan(_build("none", columns=unseen)["site"]).all()


def test_numeric_category_codes_match_across_int_float_and_text():
    task = TASK.model_copy(update={"columns": {"camera": ColumnSpec(kind="categorical")}, "site_column": None})
    spec = FeatureSpec.fit("none", task, {"camera": [1.0, 2.0, None]}, has_image=False)
    for values in ([2, 1], ["2", "1"], np.array([2.0, 1.0])):
        np.testing.assert_array_equal(spec.build({"camera": values}, None)[0], [[1], [0]])


def test_several_classes_contribute_their_log_probabilities_and_the_malignant_logit():
    task = TASK.model_copy(update={"classes": ["bcc", "mel", "nv"], "malignant": ["bcc", "mel"]})
    task = TaskSpec(**task.model_dump())
    image = np.log([[0.2, 0.3, 0.5], [1e-30, 1e-30, 1.0]])
    spec = FeatureSpec.fit("none", task, {})
    matrix, names = spec.build(None, image)
    logit, *log_probabilities = (matrix[:, names.index(n)] for n in names if n.startswith("image_"))
    assert logit[0] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose([column[0] for column in log_probabilities], image[0], rtol=1e-6)
    assert np.isfinite(matrix[1, -4:]).all()


def test_image_only_reads_nothing_and_tabular_only_reads_no_image():
    matrix, names = FeatureSpec.fit("none", TASK, COLUMNS, has_image=False).build(COLUMNS, None)
    assert not any("image" in name for name in names) and matrix.shape[0] == 6
    assert FeatureSpec.fit("image_only", TASK, COLUMNS).numeric == []


def test_extreme_numbers_stay_finite():
    columns = COLUMNS | {"tbp_lv_A": [1e300, -1e300, np.inf, 1e-300, 0, 1], "tbp_lv_Aext": [1e-300] * 6}
    features = _build("patient", columns=columns)
    assert not any(np.isinf(values).any() for values in features.values())
    assert np.isnan(features["tbp_lv_A"][2])


def test_derived_features_follow_their_formula_for_known_lesions():
    minor, long = np.array([2.0]), np.array([4.0])
    assert DERIVED["size_ratio"][1](minor, long) == 0.5
    assert DERIVED["skin_tone_ita"][1](np.array([60.0]), np.array([10.0])) == pytest.approx(45.0)
    assert DERIVED["color_difference"][1](*(np.array([x]) for x in (2.0, 3.0, 6.0))) == pytest.approx(7.0)


def test_spec_survives_json_and_refuses_features_of_a_newer_version():
    spec = FeatureSpec.fit("patient", TASK, COLUMNS)
    restored = FeatureSpec.model_validate_json(spec.model_dump_json())
    np.testing.assert_array_equal(restored.build(COLUMNS, IMAGE, PATIENTS)[0], spec.build(COLUMNS, IMAGE, PATIENTS)[0])
    with pytest.raises(ValueError, match="from_the_future"):
        FeatureSpec(context="none", derived=["from_the_future"])


@pytest.mark.parametrize(
    ("columns", "image", "groups", "context", "message"),
    [
        (COLUMNS, None, PATIENTS, "patient", "image_log_probabilities are missing"),
        (COLUMNS, IMAGE, None, "patient", "groups are missing"),
        (COLUMNS, IMAGE, PATIENTS, "none", "fitted for 'patient'"),
        (COLUMNS, IMAGE[:5], PATIENTS, "patient", "differ in length"),
        (COLUMNS | {"sex": ["male"]}, IMAGE, PATIENTS, "patient", "differ in length"),
    ],
)
def test_what_is_missing_is_named(columns, image, groups, context, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec.fit("patient", TASK, COLUMNS).build(columns, image, groups, context)
    with pytest.raises(ValueError, match="number of lesions is unknown"):
        FeatureSpec.fit("none", TASK, COLUMNS, has_image=False).build(None, None)
    with pytest.raises(ValueError, match="expected one of"):
        FeatureSpec.fit("family", TASK, COLUMNS)
