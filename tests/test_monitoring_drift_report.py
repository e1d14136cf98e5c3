"""A window's verdict: which features are compared, with which rows, and when there is none."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from modeling.schema import TaskSpec
from monitoring.drift_columns import Columns, drift_features, reference_columns
from monitoring.drift_report import DriftSettings, WindowDrift, judge_window, write_json
from tests.drift_population import columns, lesions, reference

TASK = TaskSpec(
    name="tiny",
    fold_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"age_approx": {"kind": "numeric"}, "sex": {"kind": "categorical"}},
)
SETTINGS = DriftSettings(num_resamples=400, num_splits=15)


def day(seed: int = 1, num_patients: int = 50, shifted: bool = False) -> pd.DataFrame:
    """A window's rows, metadata under `meta.`."""
    table = lesions(num_patients, seed, (2, 5), shifted)
    return table.rename(columns={"age_approx": "meta.age_approx", "sex": "meta.sex"}).assign(context="none")


@pytest.fixture(scope="module")
def known() -> Columns:
    return reference_columns(reference(), TASK)


def compared(current, known):
    return {feature.name: feature for feature in drift_features(known, columns(current, TASK), TASK)}


def judged(known, current):
    return judge_window(known, columns(current, TASK), TASK, SETTINGS)


def names_of(feature) -> list[str | None]:
    return [None if code < 0 else feature.categories[code] for code in feature.current]


def test_ordinary_days_are_quiet(known):
    for seed in (1, 2, 3):
        verdict, features = judged(known, day(seed))
        assert (verdict.status, verdict.drifted, verdict.alarm) == ("ok", [], False)
        assert verdict.num_groups == 50 and len(features) == len(verdict.features) == 10


def test_another_camera_and_older_patients_are_named(known):
    verdict, _ = judged(known, day(shifted=True))
    assert verdict.alarm and {"red", "blur", "age_approx"} <= set(verdict.drifted)
    assert "green" not in verdict.drifted and "sex" not in verdict.drifted


def test_an_embedding_shift_alone_is_found(known):
    moved = day()
    names = [name for name in moved if name.startswith("embedding_")]
    moved[names] += 0.5
    verdict, _ = judged(known, moved)
    assert verdict.drifted == ["embedding"] and verdict.embedding.auc > verdict.embedding.threshold


def test_too_small_windows_are_insufficient_and_raise_nothing(known):
    small = day(shifted=True, num_patients=8)
    for current in (small, small[:0], day(shifted=True)[:30]):
        verdict, features = judged(known, current)
        assert (verdict.status, verdict.alarm, verdict.features, features) == ("insufficient", False, [], [])
        assert verdict.num_rows == len(current)


def test_rows_without_metadata_do_not_count_as_missing(known):
    current = day()
    image_only = np.arange(len(current)) % 2 == 0
    current.loc[image_only, "context"] = "image_only"
    current.loc[image_only, ["meta.age_approx", "meta.sex"]] = None
    features = compared(current, known)
    assert "age_approx missing" not in features
    assert np.isfinite(features["age_approx"].current).sum() == (~image_only).sum()
    sex = np.array(names_of(features["sex"]), dtype=object)
    assert set(sex[~image_only]) == {"female", "male"}
    assert all(value is None for value in sex[image_only])
    assert np.isnan(features["risk_none"].current[image_only]).all()
    sent = current["risk"][image_only].to_numpy(np.float32)
    np.testing.assert_array_equal(features["risk_image_only"].current[image_only], sent)
    current.loc[1, "meta.age_approx"] = None
    assert names_of(compared(current, known)["age_approx missing"]).count("missing") == 1
    current["context"] = "image_only"
    assert {"risk_none", "age_approx", "sex"}.isdisjoint(compared(current, known))


def test_a_column_that_is_no_longer_sent_is_drift(known):
    current = day()
    current.loc[current.index % 2 == 0, "meta.age_approx"] = None
    verdict, _ = judged(known, current)
    assert "age_approx missing" in verdict.drifted
    verdict, _ = judged(known, current.drop(columns=["meta.age_approx", "meta.sex"]))
    assert {"age_approx missing", "sex"} <= set(verdict.drifted)
    assert "age_approx" in verdict.not_judged


def test_a_column_with_too_few_values_is_named_and_the_report_of_the_others_is_written(known, monkeypatch, tmp_path):
    monkeypatch.setattr("monitoring.drift_statistics.MAX_CALIBRATION_ROWS", 100)
    current = day(shifted=True)
    # Calibration thins by whole patients and cannot take this one.
    crowd = pd.concat([current[:1].assign(group="crowd")] * 101, ignore_index=True)
    current = pd.concat([current.assign(**{"meta.age_approx": None}), crowd], ignore_index=True)
    verdict, features = judged(known, current)
    assert verdict.not_judged == {"age_approx": "too few values to know what chance does"}
    assert "age_approx" not in {feature.name for feature in features}
    assert {"red", "blur", "age_approx missing"} <= set(verdict.drifted)
    write_json(tmp_path / "drift.json", verdict.to_json())


def test_values_of_the_wrong_type_are_missing_not_fatal(known):
    current = day()
    current["meta.age_approx"] = current["meta.age_approx"].astype(object)
    current.loc[:3, "meta.age_approx"] = ["old", float("inf"), None, True]
    assert np.isfinite(compared(current, known)["age_approx"].current[:4]).tolist() == [False, False, False, True]


def test_a_verdict_survives_json(known, tmp_path):
    verdict, _ = judged(known, day(shifted=True))
    assert WindowDrift.from_json(json.loads(json.dumps(verdict.to_json(), allow_nan=False))) == verdict
    empty = WindowDrift("insufficient", 0, 0)
    assert WindowDrift.from_json(empty.to_json()) == empty
    write_json(tmp_path / "a" / "drift.json", verdict.to_json())
    first = (tmp_path / "a" / "drift.json").read_bytes()
    write_json(tmp_path / "a" / "drift.json", verdict.to_json())
    assert (tmp_path / "a" / "drift.json").read_bytes() == first


def test_rows_that_hold_something_else_count_as_without_a_value():
    """Such as those of an earlier release, or of another service on the same store."""
    from monitoring.drift_columns import columns_of_rows
    from tests.drift_population import records

    (row, *_) = [record.to_row() for record in records(lesions(1, 1, (1, 1)), 0)]
    odd = [{"age_approx": [50.0, 51.0], "sex": ["f"]}, {"age_approx": "old"}, {"age_approx": 1e400}, {}]
    for rows in ([{**row, "id": str(n), "metadata": odd[n]} for n in group] for group in ([0], [1, 2, 3])):
        read = columns_of_rows([*rows, {**row, "metadata": rows[0]["metadata"], "embedding": b"12"}], TASK).columns
        assert np.isnan(read.numbers["age_approx"]).all()
        assert np.isfinite(read.embeddings).all(axis=1).tolist() == [True] * len(rows) + [False]
