"""The gate lets through what meets every rule, and names each rule that is not met."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from modeling.engine_parity import ParityLimits
from modeling.engine_set import Candidate, CandidateReport, EngineSet
from monitoring.promotion_gate import GateRules, check_gate
from tests.bundle_factory import lesion_rule
from tests.tiny_bundle import GATE_METRICS, tiny_bundle


def engine_set(passed=True, device="cpu"):
    report = CandidateReport(candidate=Candidate(name="cpu", choice={}), passed=passed)
    return EngineSet(
        bundle_digest="a" * 64,
        device=device,
        cores=2,
        created_at="2026-01-01T00:00:00+00:00",
        objective="throughput",
        limits=ParityLimits(),
        candidates=[report],
        chosen={1: "cpu"} if passed else {},
    )


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Bundles by what differs from GATE_METRICS, made once each."""
    made = {}

    def build(**metrics):
        key = repr(metrics)
        if key not in made:
            made[key] = tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", metrics)
        return made[key]

    return build


def failed(report):
    return [result.rule for result in report.failed]


def interval(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_a_good_first_model_passes_and_the_table_has_every_rule(make):
    report = check_gate(GateRules(min_pauc=0.1, min_pauc_low=0.1), make(), None, [engine_set()])
    assert report.passed, report.failed
    assert [result.rule for result in report.results] == [
        "bundle_hashes",
        "min_malignant",
        "min_auc",
        "min_auc_low",
        "min_pauc",
        "min_pauc_low",
        "min_sensitivity",
        "min_calibration_slope",
        "max_calibration_slope",
        "require_engine_parity",
    ]
    table = report.as_json()
    assert table["passed"] is True
    assert table["results"][2] == {
        "rule": "min_auc",
        "context": "image_only",
        "value": 0.9,
        "limit": ">= 0.75",
        "passed": True,
    }


@pytest.mark.parametrize(
    ("metrics", "rule"),
    [
        ({"auc": interval(0.74, 0.70, 0.8)}, "min_auc"),
        ({"auc": interval(0.9, 0.6, 0.99)}, "min_auc_low"),
        ({"sensitivity": 0.79}, "min_sensitivity"),
        ({"calibration_slope": 0.3}, "min_calibration_slope"),
        ({"calibration_slope": 3.0}, "max_calibration_slope"),
        ({"n_malignant": 19}, "min_malignant"),
    ],
)
def test_each_rule_stops_what_falls_short(make, metrics, rule):
    report = check_gate(GateRules(), make(**metrics), None, [engine_set()])
    assert failed(report) == [rule]
    assert report.as_json()["passed"] is False


def test_a_figure_that_cannot_be_measured_fails_its_rules(make):
    empty = make(auc=interval(None), sensitivity=None, calibration_slope=None)
    report = check_gate(GateRules(), empty, None, [engine_set()])
    assert failed(report) == [
        "min_auc",
        "min_auc_low",
        "min_sensitivity",
        "min_calibration_slope",
        "max_calibration_slope",
    ]
    assert str(report.failed[0]) == "min_auc (image_only) = not measurable, required >= 0.75"


def test_a_rule_that_is_off_does_not_appear(make):
    rules = GateRules(min_sensitivity=None, max_calibration_slope=None, min_calibration_slope=None)
    report = check_gate(rules, make(sensitivity=None, calibration_slope=None), None, [engine_set()])
    assert report.passed


@pytest.mark.parametrize(
    ("auc", "pauc", "expected"),
    [
        (0.88, 0.13, []),  # exactly at the margins of 0.02 and 0.01
        (0.87, 0.14, ["max_auc_drop"]),
        (0.95, 0.12, ["max_pauc_drop"]),
        (0.95, None, ["max_pauc_drop"]),
    ],
)
def test_a_candidate_may_not_be_worse_than_the_champion_by_more_than_the_margin(make, auc, pauc, expected):
    candidate = make(auc=interval(auc, 0.8, 0.96), pauc=interval(pauc))
    report = check_gate(GateRules(), candidate, make(), [engine_set()])
    assert failed(report) == expected
    assert report.champion_digest == make().digest


def test_a_champion_that_could_not_be_measured_is_no_bar(make):
    champion = make(auc=interval(None), pauc=interval(None))
    assert check_gate(GateRules(), make(), champion, [engine_set()]).passed


@pytest.mark.parametrize(
    ("sets", "value"),
    [
        ([], "no engine set; run export_engine"),
        ([engine_set(), engine_set(False, "gpu")], "refused on ['gpu']"),
    ],
)
def test_every_device_that_was_tried_must_agree_with_torch(make, sets, value):
    report = check_gate(GateRules(), make(), None, sets)
    assert failed(report) == ["require_engine_parity"]
    assert report.failed[0].value == value
    assert check_gate(GateRules(require_engine_parity=False), make(), None, sets).passed


@pytest.mark.parametrize(
    ("refused", "passes"),
    [({"gate": {"all": {"share": 0.05}}}, True), ({"gate": {"all": {"share": 0.0501}}}, False), ({}, False)],
)
def test_a_model_that_refuses_too_many_usable_pictures_is_not_promoted(tmp_path, refused, passes):
    rule = replace(lesion_rule(100), measured=refused)
    bundle = tiny_bundle(tmp_path / "bundle", abstention=rule)
    report = check_gate(GateRules(), bundle, None, [engine_set()])
    (line,) = [result for result in report.results if result.rule == "max_gate_refusals"]
    share = refused["gate"]["all"]["share"] if refused else None
    assert (line.value, line.limit, line.passed) == (share, "<= 0.05", passes)
    assert failed(report) == ([] if passes else ["max_gate_refusals"])
    assert check_gate(GateRules(max_gate_refusals=None), bundle, None, [engine_set()]).passed


def test_a_candidate_that_answers_less_or_other_classes_does_not_replace_a_champion(make, tmp_path):
    champion = tiny_bundle(tmp_path / "champion", contexts=["image_only", "none"])
    assert failed(check_gate(GateRules(), make(), champion, [engine_set()])) == ["contexts"]

    task = make().task.model_dump() | {"classes": ["nevus", "melanoma"], "malignant": ["melanoma"]}
    other = tiny_bundle(tmp_path / "other", task=task)
    assert failed(check_gate(GateRules(), other, make(), [engine_set()])) == ["require_same_task"]
    assert check_gate(GateRules(require_same_task=False), other, make(), [engine_set()]).passed


def test_only_the_named_contexts_are_judged(tmp_path):
    bundle = tiny_bundle(tmp_path / "both", contexts=["image_only", "none"])
    path = bundle.directory / "contexts" / "image_only" / "metrics.json"
    path.write_text(json.dumps({"gate": GATE_METRICS | {"auc": interval(0.1, 0.7, 0.9)}}))
    assert failed(check_gate(GateRules(), bundle, None, [engine_set()])) == ["min_auc"]
    assert check_gate(GateRules(contexts=["none"]), bundle, None, [engine_set()]).passed
    with pytest.raises(ValueError, match="no context 'patient'"):
        check_gate(GateRules(contexts=["patient"]), bundle, None, [engine_set()])


@pytest.mark.parametrize(
    "rules",
    [{"min_auc": 90}, {"min_pauc": 0.5}, {"min_acu": 0.9}, {"min_calibration_slope": 2, "max_calibration_slope": 1}],
)
def test_rules_that_make_no_sense_are_refused(rules):
    with pytest.raises(ValueError, match=next(iter(rules))):
        GateRules(**rules)
