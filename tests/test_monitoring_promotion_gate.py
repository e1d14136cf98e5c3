"""The gate lets through what meets every rule, and names each rule that is not met."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from modeling.engine_parity import ParityLimits
from modeling.engine_set import Candidate, CandidateReport, EngineSet
from modeling.paired_comparison import Difference, ModelRisks, PairedComparison, SubgroupPair, compare_models
from monitoring import promotion_gate
from monitoring.gate_table import markdown, table_lines
from monitoring.promotion_gate import Evidence, GateRules
from store.shadow_agreement import ShadowAgreement
from tests.bundle_factory import lesion_rule
from tests.tiny_bundle import GATE_METRICS, tiny_bundle


def check_gate(rules, candidate, champion, engine_sets, **evidence):
    return promotion_gate.check_gate(rules, candidate, champion, Evidence(engine_sets=engine_sets, **evidence))


def engine_set(passed=True, device="cpu", ms=None):
    ms = ms or {}
    report = CandidateReport(candidate=Candidate(name="cpu", choice={}), passed=passed, ms_per_image=ms)
    return EngineSet(
        bundle_digest="a" * 64,
        device=device,
        cores=2,
        created_at="2026-01-01T00:00:00+00:00",
        objective="throughput",
        limits=ParityLimits(),
        candidates=[report],
        chosen=dict.fromkeys([1, *ms], "cpu") if passed else {},
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
        "max_calibration_intercept",
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
        "detail": "95 % interval 0.86 to 0.94",
    }


@pytest.mark.parametrize(
    ("metrics", "rule"),
    [
        ({"auc": interval(0.74, 0.70, 0.8)}, "min_auc"),
        ({"auc": interval(0.9, 0.6, 0.99)}, "min_auc_low"),
        ({"sensitivity": 0.79}, "min_sensitivity"),
        ({"calibration_slope": 0.3}, "min_calibration_slope"),
        ({"calibration_slope": 3.0}, "max_calibration_slope"),
        ({"calibration_intercept": -0.8}, "max_calibration_intercept"),
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


NONE = Difference(None, None, None, None, None)


def comparison(malignant_groups=120, gained=3, lost=2, subgroups=(), **differences):
    """A candidate about as good as the champion; a difference is (champion, value, low, high)."""
    figures = {
        "auc": (0.9, 0.0, -0.01, 0.01),
        "pauc": (0.14, 0.001, -0.008, 0.009),
        "sensitivity": (0.95, 0.0125, -0.03, 0.05),
        "specificity": (0.6, 0.0, -0.05, 0.05),
    } | differences
    made = {
        name: NONE if figure is None else Difference(figure[0] + figure[1], *figure) for name, figure in figures.items()
    }
    return PairedComparison(400, 80, malignant_groups, gained, lost, **made, subgroups=list(subgroups))


def paired(make, rules=None, found=None, candidate=None, **evidence):
    found = found or comparison()
    return check_gate(
        GateRules(require_paired=True, **(rules or {})),
        candidate or make(),
        make(),
        [engine_set()],
        comparisons={"image_only": found},
        dataset_digest="e" * 64,
        **evidence,
    )


def line(report, rule):
    (found,) = [result for result in report.results if result.rule == rule]
    return found


def test_a_model_as_good_as_the_champion_passes_and_the_table_holds_the_intervals(make):
    report = paired(make)
    assert report.passed and report.paired and report.dataset_digest == "e" * 64
    assert line(report, "require_paired").value == "400 lesions, 80 malignant"
    assert "0.14 -> 0.141, drop's 95 % interval -0.0090 to +0.0080" in line(report, "max_pauc_drop").detail
    assert "only the candidate finds 3, only the champion 2" in line(report, "max_sensitivity_drop").detail


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({"pauc": (0.14, -0.011, -0.019, 0.0)}, ["max_pauc_drop"]),
        ({"pauc": (0.14, -0.01, -0.0201, 0.0)}, ["max_pauc_drop_high"]),
        ({"auc": (0.9, -0.021, -0.029, 0.0)}, ["max_auc_drop"]),
        ({"auc": (0.9, 0.0, -0.0301, 0.03)}, ["max_auc_drop_high"]),
        ({"sensitivity": (0.95, -0.0125, -0.05, 0.02)}, ["max_sensitivity_drop"]),
        ({"specificity": (0.6, -0.11, -0.2, 0.0)}, ["max_specificity_drop"]),
        ({"pauc": (0.14, None, None, None)}, ["max_pauc_drop", "max_pauc_drop_high"]),
    ],
)
def test_each_paired_rule_stops_what_is_worse_on_the_same_lesions(make, differences, expected):
    if differences.get("pauc", (0, 0))[1] is None:
        found = replace(comparison(), pauc=Difference(None, 0.14, None, None, None))
    else:
        found = comparison(**differences)
    assert failed(paired(make, found=found)) == expected


def test_where_few_patients_have_cancer_the_interval_is_shown_and_the_point_decides(make):
    wide = {"pauc": (0.14, -0.005, -0.05, 0.04), "auc": (0.9, -0.005, -0.08, 0.05)}
    report = paired(make, found=comparison(malignant_groups=99, **wide))
    assert report.passed
    assert line(report, "max_pauc_drop_high").value == "99 patients or groups with cancer"
    assert line(report, "max_pauc_drop_high").limit == "not judged below 100"
    assert "-0.0400 to +0.0500" in line(report, "max_pauc_drop").detail
    report = paired(make, found=comparison(malignant_groups=100, **wide))
    assert failed(report) == ["max_auc_drop_high", "max_pauc_drop_high"]


def test_superiority_is_asked_where_it_is_configured(make):
    assert failed(paired(make, {"require_superiority": True})) == ["require_superiority"]
    better = comparison(pauc=(0.14, 0.02, 0.001, 0.04))
    assert paired(make, {"require_superiority": True}, better).passed


def test_the_subgroup_that_lost_is_named(make):
    pairs = [SubgroupPair("sex", "female", 40, 0.95, 0.95), SubgroupPair("site", "face", 12, 0.7, 0.95)]
    report = paired(make, found=comparison(subgroups=pairs))
    assert failed(report) == ["max_subgroup_sensitivity_drop"]
    assert "site face, 12 cancers: 0.95 -> 0.7" in str(report.failed[0])
    assert paired(make, {"max_subgroup_sensitivity_drop": 0.25}, comparison(subgroups=pairs)).passed


def test_a_subgroup_below_the_floor_stops_a_first_model_too(make, tmp_path):
    def row(value, sensitivity, count):
        return {"column": "age", "value": value, "n": 90, "n_malignant": count, "sensitivity": sensitivity}

    table = [row("under 30", None, 3), row("30-44", 0.5, 12), row("45-59", 0.55, 20), row("60-74", 0.9, 30)]
    bundle = tiny_bundle(tmp_path / "bundle", clinical={"subgroups": table})
    report = check_gate(GateRules(), bundle, None, [engine_set()])
    assert [result.detail for result in report.failed] == ["age 30-44, 12 cancers", "age 45-59, 20 cancers"]
    report = check_gate(GateRules(min_subgroup_sensitivity=0.5), bundle, None, [engine_set()])
    assert report.passed and line(report, "min_subgroup_sensitivity").detail == "age 30-44, 12 cancers"


def test_an_unpaired_comparison_says_so_and_passes_only_where_it_may(make):
    report = check_gate(GateRules(require_paired=True), make(), make(), [engine_set()], unpaired="no data set given")
    assert failed(report) == ["require_paired"] and not report.paired
    assert report.failed[0].value == "unpaired: no data set given"
    report = check_gate(GateRules(), make(), make(), [engine_set()])
    assert report.passed and line(report, "max_pauc_drop").detail == "unpaired"


def test_a_sensitivity_below_the_champions_is_refused_without_pairing_too(make):
    assert failed(check_gate(GateRules(), make(sensitivity=0.94), make(), [engine_set()])) == ["max_sensitivity_drop"]


def test_a_bundle_must_be_as_good_here_as_it_says(make):
    assert failed(paired(make, gate_auc={"image_only": 0.89})) == ["max_auc_mismatch"]
    assert paired(make, gate_auc={"image_only": 0.9004}).passed


def test_risks_for_another_prevalence_are_not_held_to_the_gate_splits(tmp_path):
    training = {"build": {"prevalence": 0.001}}
    bundle = tiny_bundle(tmp_path / "bundle", {"calibration_intercept": None}, training=training)
    assert check_gate(GateRules(), bundle, None, [engine_set()]).passed
    bundle = tiny_bundle(tmp_path / "other", {"calibration_intercept": None})
    assert failed(check_gate(GateRules(), bundle, None, [engine_set()])) == ["max_calibration_intercept"]


@pytest.mark.parametrize(
    ("own", "champions", "rules", "expected"),
    [
        ({1: 5.0, 8: 3.0}, {1: 3.0, 8: 2.0}, {}, []),
        ({1: 5.0, 8: 4.1}, {1: 3.0, 8: 2.0}, {}, ["max_latency_ratio"]),
        ({1: 5.0, 8: 4.1}, {1: 3.0, 8: 2.0}, {"max_latency_ratio": None}, []),
        ({1: 5.0, 8: 4.1}, {}, {}, []),
        ({1: 5.0, 8: 4.1}, {}, {"max_ms_per_image": 4.5}, ["max_ms_per_image"]),
        ({1: 4.0}, {}, {"max_ms_per_image": 4.5}, ["max_ms_per_image"]),  # batches of 8 were not timed
    ],
)
def test_a_slower_model_is_held_to_the_champions_time_on_the_same_device(make, own, champions, rules, expected):
    other = [engine_set(ms=champions), engine_set(device="gpu", ms={1: 0.1, 8: 0.1})]
    report = check_gate(GateRules(**rules), make(), make(), [engine_set(ms=own)], champion_engine_sets=other)
    assert failed(report) == expected
    if expected == ["max_latency_ratio"]:
        assert "2 -> 4.1 ms per image on cpu" in str(report.failed[0]) and report.failed[0].context == "batch 8"


def agreement(**figures):
    agreed = {"pairs": 500, "rank_correlation": 0.9, "same_band": 0.9, "raised": 0.02, "lowered": 0.01}
    return ShadowAgreement("1", "2", **(agreed | figures))


@pytest.mark.parametrize(
    ("shadow", "rules", "expected"),
    [
        (agreement(), {}, []),
        (agreement(rank_correlation=0.4), {}, ["shadow.min_rank_correlation"]),
        (agreement(rank_correlation=None), {}, ["shadow.min_rank_correlation"]),
        (agreement(same_band=0.5), {}, ["shadow.max_band_changes"]),
        (agreement(lowered=0.06), {}, ["shadow.max_lowered"]),
        (agreement(raised=0.3), {}, ["shadow.max_raised"]),
        (agreement(shadow_abstained=100), {}, ["shadow.max_abstained"]),
        (agreement(lowered=0.06), {"max_lowered": None}, []),
        (agreement(pairs=199, lowered=0.9), {}, []),  # too few to judge
        (agreement(pairs=199), {"required": True}, ["shadow.min_pairs"]),
        (agreement(pairs=0), {}, []),
        (None, {"required": True}, ["shadow.min_pairs"]),
    ],
)
def test_a_candidate_that_ran_as_a_shadow_must_agree_with_the_champion(make, shadow, rules, expected):
    report = paired(make, {"shadow": rules}, shadow=shadow)
    assert failed(report) == expected
    asked = [result.rule for result in report.results if result.rule.startswith("shadow.")]
    assert bool(asked) == (bool(shadow and shadow.pairs) or bool(rules.get("required")))


def test_the_table_is_aligned_and_marks_what_failed(make):
    report = check_gate(GateRules(), make(auc=interval(0.7, 0.66, 0.74)), None, [engine_set()])
    lines = table_lines(report)
    column = lines[0].index("required")
    assert all(text[column - 1] == " " and text[column] != " " for text in lines)
    assert [text.split()[:2] for text in lines if text.startswith("FAILED")] == [["FAILED", "min_auc"]]
    page = markdown(report, "7", None, ["A note."])
    assert page.startswith("# Version 7: refused, 1 rules failed\n") and "A note." in page
    assert "- min_auc (image_only) = 0.7, required >= 0.75 (95 % interval 0.66 to 0.74)" in page
    rows = [text for text in page.splitlines() if text.startswith("|")]
    assert len(rows) == len(report.results) + 2 and {row.count("|") for row in rows} == {7}


def test_a_real_comparison_of_a_blunt_candidate_is_refused(make):
    import numpy as np

    rng = np.random.default_rng(0)
    malignant = np.arange(1000) < 150
    sharp = rng.normal(size=1000) + 2.5 * malignant
    blunt = sharp + 1.5 * rng.normal(size=1000)

    def judged(risks):
        own = [ModelRisks(values, float(np.quantile(values[malignant], 0.05))) for values in (risks, sharp)]
        return failed(paired(make, found=compare_models(malignant, np.arange(1000), *own, num_bootstrap=200)))

    assert "max_pauc_drop" in judged(blunt) and "max_auc_drop" in judged(blunt)
    assert judged(sharp + 0.01 * rng.normal(size=1000)) == []
