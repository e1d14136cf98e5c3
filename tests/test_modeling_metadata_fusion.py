"""Fusion: metadata helps where it knows something, never hurts much, and leaving a field out buys no low risk."""

import subprocess
import sys

import numpy as np
import pytest

from modeling.calibration import log_softmax
from modeling.metadata_fusion import UNLIKE_TREES, BoosterConfig, ContextModel, FusionConfig, fit_context_model
from modeling.metrics import calibration_slope_intercept, roc_auc
from modeling.schema import ColumnSpec, TaskSpec

BINARY = TaskSpec(
    name="binary",
    fold_group="patient_id",
    context_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"size": ColumnSpec(), "noise": ColumnSpec(), "site": ColumnSpec(kind="categorical")},
    site_column="site",
)
SEVEN = TaskSpec(
    name="seven",
    fold_group="lesion_id",
    label_column="dx",
    classes=["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"],
    malignant=["akiec", "bcc", "mel"],
    columns={"age": ColumnSpec(), "site": ColumnSpec(kind="categorical")},
)
QUICK = FusionConfig(
    boosters=tuple(UNLIKE_TREES[kind].model_copy(update={"num_bags": 1}) for kind in (0, 3)), num_boost_round=60
)
BALANCED = [0.5, 0.5]


def _patients(num_patients=120, per_patient=8, seed=0):
    """Lesions whose size matters relative to the patient's others, with overconfident image scores."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), per_patient)
    labels = (rng.random(len(patients)) < 0.15).astype(np.int64)
    size = 2.0 * rng.normal(size=num_patients)[patients] + rng.normal(size=len(patients)) + 1.5 * labels
    logit = 2.0 * (1.2 * (rng.normal(size=len(patients)) + 1.2 * labels - 0.6))
    columns = {
        "size": size.tolist(),
        "noise": rng.normal(size=len(patients)).tolist(),
        "site": rng.choice(["arm", "leg"], len(patients)).tolist(),
    }
    return log_softmax(np.stack([np.zeros_like(logit), logit], 1)), columns, labels, patients


def _fit(
    context, image, columns, labels, patients, config=QUICK, population=None, seed=0, task=BINARY, sampling=BALANCED
):
    return fit_context_model(
        context, task, image, columns, labels, patients, patients % 3, config, sampling, population, seed
    )


@pytest.fixture(scope="module")
def lesions():
    return _patients()


@pytest.fixture(scope="module")
def fitted(lesions):
    return {context: _fit(context, *lesions) for context in BINARY.contexts}


@pytest.fixture(scope="module")
def fresh():
    return _patients(seed=1)


def test_each_context_knows_more_than_the_one_before(fitted, fresh):
    image, columns, labels, patients = fresh
    auc = {name: roc_auc(labels, model.predict(image, columns, patients)[:, 1]) for name, (model, _) in fitted.items()}
    assert auc["image_only"] + 0.015 < auc["none"] < auc["patient"] - 0.015


def test_fused_beats_metadata_alone(fitted, lesions, fresh):
    image, columns, labels, patients = fresh
    tabular, _ = _fit("patient", None, *lesions[1:])
    fused = roc_auc(labels, fitted["patient"][0].predict(image, columns, patients)[:, 1])
    assert fused > roc_auc(labels, tabular.predict(None, columns, patients)[:, 1]) + 0.02 > 0.72


@pytest.mark.parametrize("context", ["image_only", "none", "patient"])
def test_risks_are_calibrated_on_fresh_patients(fitted, fresh, context):
    image, columns, labels, patients = fresh
    probabilities = fitted[context][0].predict(image, columns, patients)
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    slope, intercept = calibration_slope_intercept(labels, probabilities[:, 1])
    assert 0.75 < slope < 1.35 and abs(intercept) < 0.3


@pytest.mark.parametrize("context", ["image_only", "none", "patient"])
def test_thresholds_reach_their_sensitivity_out_of_fold(fitted, lesions, context):
    model, out_of_fold = fitted[context]
    flagged = out_of_fold[lesions[2] == 1, 1] >= model.thresholds.threshold
    assert model.thresholds.operating_sensitivity == 0.95 <= flagged.mean() < 0.97


def test_out_of_fold_probabilities_have_not_seen_their_label(lesions):
    image, columns, labels, patients = lesions
    shuffled = np.random.default_rng(2).permutation(labels)
    _, out_of_fold = _fit("patient", image, columns, shuffled, patients)
    assert roc_auc(shuffled, out_of_fold[:, 1]) == pytest.approx(0.5, abs=0.08)


def test_useless_metadata_costs_nothing(lesions, fresh):
    image, columns, labels, patients = lesions
    rng = np.random.default_rng(3)

    def useless(n):
        return {"size": rng.normal(size=n), "noise": rng.normal(size=n), "site": rng.choice(["arm", "leg"], n)}

    few = patients < 30  # 240 lesions, about 36 malignant
    columns = useless(few.sum())
    fused, _ = _fit("patient", image[few], columns, labels[few], patients[few])
    alone, _ = _fit("image_only", image[few], columns, labels[few], patients[few])
    image, _, labels, patients = fresh
    with_metadata = fused.predict(image, useless(len(labels)), patients)
    image_alone = alone.predict(image)
    assert roc_auc(labels, with_metadata[:, 1]) > roc_auc(labels, image_alone[:, 1]) - 0.015
    loss = [-np.log(p[np.arange(len(labels)), labels]).mean() for p in (with_metadata, image_alone)]
    assert loss[0] < loss[1] + 0.01


def test_leaving_a_field_out_does_not_lower_the_risk(lesions, fresh):
    """In ISIC 2024 a missing site means benign: learned as such, a caller who omits it would get a low risk."""
    image, columns, labels, patients = lesions
    trap = np.where((labels == 0) & (np.random.default_rng(4).random(len(labels)) < 0.4), None, columns["site"])
    model, _ = _fit("none", image, columns | {"site": trap.tolist()}, labels, patients)
    image, columns, _, _ = fresh
    given = model.predict(image, columns)[:, 1]
    omitted = model.predict(image, {name: values for name, values in columns.items() if name != "site"})[:, 1]
    assert omitted.mean() > 0.9 * given.mean()


def test_same_seed_same_model_other_seed_other_model(fitted, lesions):
    again, out_of_fold = _fit("none", *lesions)
    np.testing.assert_array_equal(out_of_fold, fitted["none"][1])
    np.testing.assert_array_equal(
        again.predict(lesions[0], lesions[1]), fitted["none"][0].predict(lesions[0], lesions[1])
    )
    assert (_fit("none", *lesions, seed=1)[1] != out_of_fold).any()


@pytest.mark.parametrize("context", ["image_only", "none", "patient"])
def test_a_saved_model_answers_exactly_the_same(fitted, fresh, context, tmp_path):
    image, columns, _, patients = fresh
    model, _ = fitted[context]
    model.save(tmp_path / context)
    loaded = ContextModel.load(tmp_path / context, BINARY)
    np.testing.assert_array_equal(loaded.predict(image, columns, patients), model.predict(image, columns, patients))
    assert (loaded.context, loaded.thresholds, loaded.feature_names) == (context, model.thresholds, model.feature_names)


def test_a_single_lesion_gets_the_answer_it_has_in_a_batch(fitted, fresh):
    image, columns, _, _ = fresh
    model, _ = fitted["none"]
    batch = model.predict(image, columns)
    for row in range(5):
        one = model.predict(image[row : row + 1], {name: [values[row]] for name, values in columns.items()})
        np.testing.assert_allclose(one[0], batch[row], rtol=1e-12)


def test_another_population_moves_the_risk_by_its_odds_and_keeps_the_decisions(fitted, lesions, fresh):
    image, columns, labels, patients = lesions
    frequency = labels.mean()
    rare, out_of_fold = _fit("none", image, columns, labels, patients, population=[0.999, 0.001])
    here, there = fitted["none"][0].predict(fresh[0], fresh[1])[:, 1], rare.predict(fresh[0], fresh[1])[:, 1]
    beta = (0.001 / 0.999) / (frequency / (1 - frequency))
    np.testing.assert_allclose(there, beta * here / (beta * here + 1 - here))
    np.testing.assert_array_equal(there >= rare.thresholds.threshold, here >= fitted["none"][0].thresholds.threshold)


def test_a_class_of_twenty_rows_keeps_its_frequency_among_seven():
    rng = np.random.default_rng(5)

    def sample(counts):
        labels = np.repeat(np.arange(7), counts)
        image = log_softmax(3.0 * (rng.normal(size=(len(labels), 7)) + 1.5 * np.eye(7)[labels]))
        columns = {
            "age": 30 + 8.0 * labels + rng.normal(0, 15, len(labels)),
            "site": rng.choice(["a", "b", None], len(labels)),
        }
        return image, columns, labels, np.arange(len(labels))

    counts = np.array([45, 70, 150, 20, 150, 545, 20])
    config = FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=30)
    model, _ = _fit("none", *sample(counts), config=config, task=SEVEN, sampling=np.full(7, 1 / 7))
    image, columns, labels, _ = sample(3 * counts)
    probabilities = model.predict(image, columns)
    assert model.num_rounds and min(model.num_rounds) > 0
    np.testing.assert_allclose(probabilities.mean(0), counts / counts.sum(), atol=0.02)
    alone = _fit("image_only", *sample(counts), task=SEVEN, sampling=np.full(7, 1 / 7))[0].predict(image)
    loss = [-np.log(p[np.arange(len(labels)), labels]).mean() for p in (probabilities, alone)]
    assert loss[0] < loss[1]


def test_isotonic_calibration_keeps_the_ranking(fitted, lesions, fresh):
    config = QUICK.model_copy(update={"calibration": "isotonic"})
    isotonic = _fit("none", *lesions, config=config)[0].predict(fresh[0], fresh[1])[:, 1]
    np.testing.assert_array_equal(np.argsort(isotonic), np.argsort(fitted["none"][0].predict(fresh[0], fresh[1])[:, 1]))


def test_a_patient_in_two_folds_is_refused(lesions):
    image, columns, labels, patients = lesions
    names = np.array([f"IP_{number}" for number in patients])

    def fit(folds):
        return fit_context_model("patient", BINARY, image, columns, labels, names, folds, QUICK, BALANCED, None, 0)

    folds = patients % 3
    folds[np.flatnonzero(patients == 7)[1]] = 0
    with pytest.raises(ValueError, match="groups: 'IP_7' has lesions in folds 1 and 0; expected a patient's lesions"):
        fit(folds)


@pytest.mark.parametrize("context", ["none", "patient"])
def test_degenerate_metadata_falls_back_to_the_image(lesions, context):
    image, _, labels, _ = lesions
    singles = np.arange(len(labels))  # one lesion per patient
    for columns in (None, {"size": [1.0] * len(labels), "noise": [None] * len(labels), "site": ["arm"] * len(labels)}):
        model, _ = _fit(
            context,
            image,
            columns,
            labels,
            singles,
            config=FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=20),
        )
        alone, _ = _fit("image_only", image, None, labels, singles)
        fused = model.predict(image, columns, singles)
        assert np.isfinite(fused).all()
        assert roc_auc(labels, fused[:, 1]) == pytest.approx(roc_auc(labels, alone.predict(image)[:, 1]), abs=0.02)


def test_a_handful_of_lesions_still_gives_a_model(lesions):
    image, columns, labels, patients = lesions
    rows = np.concatenate([np.flatnonzero(labels == 1)[:4], np.flatnonzero(labels == 0)[:14]])
    columns = {name: np.array(values)[rows] for name, values in columns.items()}
    model, out_of_fold = _fit("patient", image[rows], columns, labels[rows], np.arange(18))
    assert ((out_of_fold > 0) & (out_of_fold < 1)).all() and len(model.thresholds.points) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(960, np.int64)}, "0 of 960 lesions are malignant"),
        ({"labels": np.full(960, 2)}, "labels range from 2 to 2; expected 0 to 1"),
        ({"patients": np.zeros(960, np.int64)}, "folds hold 1 distinct values"),
        ({"image": np.full((960, 3), -1.0)}, r"shape \(960, 3\); expected \(N, 2\)"),
        ({"image": np.full((960, 2), np.nan)}, "NaN in 960 rows"),
        ({"sampling": [0.5, 0.3, 0.2]}, "sampling_prior is .* expected 2"),
        ({"population": [1.0, -0.1]}, "population_prior is"),
    ],
)
def test_impossible_training_rows_are_refused_in_one_line(lesions, change, message):
    arguments = dict(zip(("image", "columns", "labels", "patients"), lesions, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        _fit("image_only", **arguments)


def test_predicting_without_what_the_model_reads_is_refused(fitted, lesions):
    image, columns, _, _ = lesions
    with pytest.raises(ValueError, match="groups are missing"):
        fitted["patient"][0].predict(image, columns)
    with pytest.raises(ValueError, match="image_log_probabilities are missing"):
        fitted["none"][0].predict(None, columns)


def test_loading_refuses_damaged_models_and_other_tasks(fitted, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        ContextModel.load(tmp_path, BINARY)
    fitted["none"][0].save(tmp_path)
    with pytest.raises(ValueError, match="the task has"):
        ContextModel.load(tmp_path, SEVEN)
    (tmp_path / "booster_1.txt").unlink()
    with pytest.raises(ValueError, match="booster_1.txt is missing"):
        ContextModel.load(tmp_path, BINARY)
    (tmp_path / "model.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema_version 99; expected 1"):
        ContextModel.load(tmp_path, BINARY)


def test_importing_the_serving_path_brings_neither_pandas_nor_torch():
    code = (
        "import sys, modeling.metadata_fusion, modeling.metadata_record\n"
        "print(sorted({'pandas', 'torch', 'sklearn', 'lightgbm', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
