"""Quality on labelled answers: right where everything is labelled, and honest where mostly suspicious lesions are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from modeling.calibration import sigmoid
from monitoring.labelled_answers import LabelledAnswers, read_labelled_answers
from monitoring.model_quality import QualitySettings, model_quality, quality_problems
from monitoring.prediction_log import PredictionLog
from store.labels import NewLabel, add_label
from tests.drift_population import lesions, records
from tests.tiny_bundle import GATE_METRICS, tiny_bundle, tiny_task

SETTINGS = QualitySettings(num_bootstrap=200)
TASK = tiny_task().model_copy(update={"subgroup_columns": ["sex"]})
THRESHOLD, HIGH = 0.2, 0.5
DAY_US = 86_400_000_000


def population(size: int, seed: int = 0, separation: float = 2.0, prevalence: float = 0.2) -> pd.DataFrame:
    """Scored lesions, two per patient, all with their truth."""
    rng = np.random.default_rng(seed)
    malignant = rng.random(size) < prevalence
    risk = sigmoid(rng.normal(separation * malignant - 2.0, 1.0))
    return pd.DataFrame(
        {
            "id": [f"p{index}" for index in range(size)],
            "received_at": 0,
            "institution": rng.choice(["A", "B"], size),
            "device": None,
            "context": "none",
            "risk": risk,
            "threshold": THRESHOLD,
            "band": np.select([risk >= HIGH, risk >= THRESHOLD], ["high", "moderate"], "low"),
            "abstained": False,
            "group": [f"g{index // 2}" for index in range(size)],
            "malignant": malignant,
            "delay_us": rng.integers(DAY_US, 9 * DAY_US, size),
            "meta.sex": rng.choice(["female", "male"], size),
            "meta.age_approx": rng.choice([40.0, 70.0], size),
        }
    )


def answers(table: pd.DataFrame, labelled: np.ndarray) -> LabelledAnswers:
    counts = Counter(zip(table["context"], table["band"], strict=True))
    return LabelledAnswers(table[labelled].reset_index(drop=True), dict(counts), 0, [])


def everything(table: pd.DataFrame) -> np.ndarray:
    return np.ones(len(table), bool)


def suspicious_first(table: pd.DataFrame, seed: int = 1) -> np.ndarray:
    """Which lesions were biopsied: nearly all that look dangerous, one in twelve of the others."""
    share = table["band"].map({"high": 0.95, "moderate": 0.6, "low": 0.08}).to_numpy()
    return np.random.default_rng(seed).random(len(table)) < share


def test_where_everything_is_labelled_plain_and_corrected_figures_agree():
    table = population(1500)
    figures = model_quality(answers(table, everything(table)), TASK, SETTINGS)["contexts"]["none"]
    malignant, flagged = table["malignant"].to_numpy(), (table["risk"] >= THRESHOLD).to_numpy()
    assert figures["sensitivity"]["value"] == pytest.approx(flagged[malignant].mean())
    assert figures["specificity"]["value"] == pytest.approx((~flagged[~malignant]).mean())
    assert figures["missed"] == (malignant & ~flagged).sum() and figures["share_labelled"] == 1.0
    for name in ("auc", "pauc", "sensitivity", "specificity"):
        plain, corrected = figures[name], figures["corrected"][name]
        assert corrected["value"] == pytest.approx(plain["value"])
        assert plain["low"] < plain["value"] < plain["high"]
    assert {(row["column"], row["value"]) for row in figures["subgroups"]} >= {
        ("sex", "female"),
        ("institution", "A"),
        ("age", "60-74"),
    }


def test_correction_undoes_that_suspicious_lesions_are_labelled_first():
    table = population(6000)
    truth = model_quality(answers(table, everything(table)), TASK, SETTINGS)["contexts"]["none"]
    seen = model_quality(answers(table, suspicious_first(table)), TASK, SETTINGS)["contexts"]["none"]
    assert seen["sensitivity"]["value"] > truth["sensitivity"]["value"] + 0.05
    for name in ("auc", "sensitivity", "specificity"):
        found, expected = seen["corrected"][name], truth[name]["value"]
        assert found["low"] <= expected <= found["high"], name
        assert abs(found["value"] - expected) < abs(seen[name]["value"] - expected), name


def test_a_band_without_labels_is_named_and_nothing_is_corrected():
    table = population(800)
    figures = model_quality(answers(table, (table["band"] != "low").to_numpy()), TASK, SETTINGS)["contexts"]["none"]
    assert figures["corrected"] is None and "of band low are labelled" in figures["not_corrected"]
    assert figures["auc"]["value"] is not None


@pytest.mark.parametrize("which", ["none", "benign", "malignant"])
def test_no_labels_or_one_class_give_no_figure_and_no_alarm(which, tmp_path):
    table = population(400)
    malignant = table["malignant"].to_numpy()
    labelled = {"none": malignant & ~malignant, "benign": ~malignant, "malignant": malignant}[which]
    quality = model_quality(answers(table, labelled), TASK, SETTINGS)
    figures = quality["contexts"]["none"]
    assert quality["labelled"] == labelled.sum() and figures["auc"]["value"] is None
    assert (figures["sensitivity"]["value"] is None) == (which != "malignant")
    assert (figures["specificity"]["value"] is None) == (which != "benign")
    assert (quality["delay_days"]["median"] is None) == (which == "none")


def bundle_like(tmp_path, table: pd.DataFrame):
    """A bundle whose gate split found what this population shows."""
    figures = model_quality(answers(table, everything(table)), TASK, SETTINGS)["contexts"]["none"]
    gate = GATE_METRICS | {"auc": figures["auc"], "sensitivity": figures["sensitivity"]["value"]}
    return tiny_bundle(tmp_path / "bundle", metrics=gate, contexts=["none"])


def test_a_model_that_got_worse_is_noticed_and_an_unchanged_one_is_not(tmp_path):
    bundle = bundle_like(tmp_path, population(3000, seed=5))
    for seed in range(10):
        same = population(1200, seed=20 + seed)
        quality = model_quality(answers(same, suspicious_first(same, seed)), TASK, SETTINGS)
        assert quality_problems(quality, bundle, SETTINGS) == []
    worse = population(1200, seed=8, separation=0.6)
    quality = model_quality(answers(worse, suspicious_first(worse)), TASK, SETTINGS)
    problems = quality_problems(quality, bundle, SETTINGS)
    assert [problem.split()[0] for problem in problems] == ["sensitivity", "AUC"]
    few = model_quality(answers(worse.head(30), everything(worse.head(30))), TASK, SETTINGS)
    assert quality_problems(few, bundle, SETTINGS) == []


def test_labels_are_read_with_what_their_readers_agree_on(any_store_url, tmp_path):
    log = PredictionLog(any_store_url, str(tmp_path / "images"), str(tmp_path / "spool"))
    table = lesions(12, 3, rows=(2, 2))
    written = records(table, 1_000, threshold=0.1, band="low")
    log.write(written, {})
    log.write(records(lesions(2, 9, rows=(1, 1)), 2_000, model_version="2", threshold=0.1, band="low"), {})
    log.write(records(lesions(1, 11, rows=(1, 1)), 3_000, risk=None, abstained=True, reasons=["blurred"]), {})
    for index, record in enumerate(written[:6]):
        add_label(log.store, NewLabel(record.id, "malignant", True, "Ada", labelled_at=DAY_US), "Ada")
        if index < 2:
            says = ("malignant", True) if index == 0 else ("benign", False)
            add_label(log.store, NewLabel(record.id, *says, "Ben", labelled_at=3 * DAY_US), "Ben")
    found = read_labelled_answers(log.store, 0, 10**12, "1")
    assert found.answers == {("none", "low"): len(written)} and found.abstentions == 1
    assert found.states == {"agreed": 1, "disagreed": 1, "single": 4}
    assert set(found.rows["id"]) == {record.id for record in written[:6] if record.id != written[1].id}
    assert found.rows["malignant"].all() and (found.rows["delay_us"] > 0.9 * DAY_US).all()
    assert set(found.rows["meta.sex"]) <= {"female", "male"} and set(found.rows["group"]) <= {
        record.patient_hmac for record in written
    }
    # Of an earlier release, say: it counts as without an answer, and stops no check.
    (odd,) = records(lesions(1, 13, rows=(1, 1)), 4_000, risk=None, threshold=0.1, band=None)
    log.write([odd], {})
    add_label(log.store, NewLabel(odd.id, "malignant", True, "Ada", labelled_at=DAY_US), "Ada")
    found = read_labelled_answers(log.store, 0, 10**12, "1")
    assert found.answers == {("none", "low"): len(written)} and found.abstentions == 2
    quality = model_quality(found, TASK, SETTINGS)
    assert (quality["abstained_malignant"], quality["contexts"]["none"]["n"]) == (1, 5)
    assert read_labelled_answers(log.store, 10**12, 10**13).rows.empty
    log.store.close()
