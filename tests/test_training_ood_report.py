"""The report counts what the rule refuses, with intervals, by kind and reason, apart for malignant lesions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines.batch_scoring import ScoredImages
from modeling.preprocessing import decode_image
from tests.bundle_factory import lesion_image, lesion_rule
from tests.tiny_bundle import SIZE, expected_outputs
from training.ood_pictures import CORRUPTIONS, NON_LESIONS
from training.ood_report import false_refusals, measure_kinds, plot_abstention


@pytest.fixture(scope="module")
def rule():
    return lesion_rule()


@pytest.fixture(scope="module")
def report(rule):
    lesions = [decode_image(lesion_image(seed)) for seed in range(5)]
    return measure_kinds(rule, lambda images: expected_outputs(images)[1], SIZE, lesions, number=4, seed=0)


def test_false_refusals_are_counted_apart_for_malignant_lesions(rule):
    figures = {"brightness": 0.6, "contrast": 0.2, "blur": 2.8, "red": 0.6, "green": 0.6, "blue": 0.6}
    quality = {name: np.full(10, value) for name, value in figures.items()}
    middle = {name: (limit.low + limit.high) / 2 for name, limit in rule.limits.items()}
    quality |= {"brightness": np.full(10, middle["brightness"]), "blur": np.full(10, middle["sharpness"])}
    quality |= {"contrast": np.full(10, 10 ** middle["contrast"] - 1 / 255)}
    distance = np.zeros(10)
    quality["brightness"][0] = -1.0
    distance[[1, 2]] = rule.max_distance * 2
    scored = ScoredImages(np.arange(10), np.zeros((10, 2)), None, quality, distance=distance)
    counts = false_refusals(rule, scored, np.arange(10) < 2, np.arange(10))
    assert {name: (counts[name]["refused"], counts[name]["n"]) for name in ("all", "malignant", "benign")} == {
        "all": (3, 10),
        "malignant": (2, 2),
        "benign": (1, 8),
    }
    assert counts["all"]["low"] < counts["all"]["share"] == 0.3 < counts["all"]["high"]
    assert counts["reasons"] == {"unlike_training": 2, "too_dark": 1}
    assert false_refusals(rule, scored, np.zeros(10, bool), np.arange(10))["malignant"]["share"] is None
    # Of one patient they tell as much as one picture.
    one = false_refusals(rule, scored, np.arange(10) < 2, np.zeros(10))
    assert one["all"]["share"] == 0.3 and one["all"]["high"] > counts["all"]["high"] + 0.2


def test_every_kind_is_measured_and_the_obvious_ones_are_refused_for_their_reason(report):
    rows = {row["kind"]: row for row in report.measured["kinds"]}
    assert list(rows) == [kind.name for kind in NON_LESIONS + CORRUPTIONS] == list(report.examples)
    assert {row["n"] for row in rows.values() if row["set"] == "non_lesion"} == {4}
    assert {row["n"] for row in rows.values() if row["set"] == "corrupted_lesion"} == {5}
    for kind, reason in (("lens_cap", "too_dark"), ("darkened", "too_dark"), ("blurred_heavily", "blurred")):
        assert rows[kind]["share"] == 1.0 and rows[kind]["reasons"][reason] == rows[kind]["n"]
    json.dumps(report.measured, allow_nan=False)


def test_the_contact_sheet_shows_every_kind(report, tmp_path):
    gate = {"all": {"n": 100, "refused": 1, "share": 0.01, "low": 0.001, "high": 0.05}}
    report.measured["gate"] = gate
    plot_abstention(tmp_path / "abstention.png", report, "tiny")
    sheet = decode_image((tmp_path / "abstention.png").read_bytes())
    assert sheet.shape[1] > 1000 and sheet.shape[0] > 500
    # 30 pictures on white.
    assert (sheet < 250).any(axis=2).mean() > 0.25
