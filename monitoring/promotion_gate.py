"""The quality gate: rules a candidate must pass before it may become the champion, and the table of what it did.

Metrics are those of the gate split, which trained nothing. A figure that cannot be measured fails its rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from modeling.bundle import Bundle
from modeling.engine_set import EngineSet
from monitoring.gate_comparison import (
    Evidence,
    latency_lines,
    metric,
    paired_lines,
    pairing_line,
    shadow_lines,
    unpaired_lines,
)
from monitoring.gate_rules import GateRules, RuleResult, at_least, at_most, worst_first

__all__ = ["Evidence", "GateReport", "GateRules", "RuleResult", "check_gate"]


class GateReport(BaseModel):
    """The verdict on one bundle, with every rule's value and limit.

    Attributes:
        paired: both models were scored on the same lesions, of the gate split of `dataset_digest`.
    """

    bundle_digest: str
    champion_digest: str | None
    dataset_digest: str | None = None
    paired: bool = False
    results: list[RuleResult]

    @property
    def failed(self) -> list[RuleResult]:
        return [result for result in self.results if not result.passed]

    @property
    def passed(self) -> bool:
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """What is kept of it: `passed`, digests and the table."""
        return {"passed": self.passed, **self.model_dump(mode="json")}


def _metric_lines(rules: GateRules, context: str, metrics: dict[str, Any], in_the_large: bool) -> Iterator[RuleResult]:
    minima = [
        ("min_malignant", metric(metrics, "n_malignant"), ""),
        ("min_auc", metric(metrics, "auc"), _interval(metrics, "auc")),
        ("min_auc_low", metric(metrics, "auc", "low"), ""),
        ("min_pauc", metric(metrics, "pauc"), _interval(metrics, "pauc")),
        ("min_pauc_low", metric(metrics, "pauc", "low"), ""),
        ("min_sensitivity", metric(metrics, "sensitivity"), _interval(metrics.get("intervals", {}), "sensitivity")),
        ("min_calibration_slope", metric(metrics, "calibration_slope"), ""),
    ]
    for rule, value, detail in minima:
        limit = getattr(rules, rule)
        if limit is not None:
            yield at_least(rule, context, value, limit, detail)
    if rules.max_calibration_slope is not None:
        slope = metric(metrics, "calibration_slope")
        yield at_most("max_calibration_slope", context, slope, rules.max_calibration_slope)
    if rules.max_calibration_intercept is not None and in_the_large:
        shift = metric(metrics, "calibration_intercept")
        detail = "" if shift is None else f"intercept {shift:+.3f}; above 0 risks are too low"
        value = None if shift is None else abs(shift)
        yield at_most("max_calibration_intercept", context, value, rules.max_calibration_intercept, detail)


def _interval(metrics: dict[str, Any], name: str) -> str:
    low, high = (metric(metrics, name, end) for end in ("low", "high"))
    return "" if low is None or high is None else f"95 % interval {low:.4g} to {high:.4g}"


def _subgroup_lines(rules: GateRules, context: str, report: dict[str, Any]) -> list[RuleResult]:
    """The subgroups of a bundle's report; those with too few cancers have no sensitivity there."""
    if rules.min_subgroup_sensitivity is None:
        return []
    table = report.get("clinical", {}).get("subgroups", [])
    measured = sorted((row for row in table if row["sensitivity"] is not None), key=lambda row: row["sensitivity"])
    lines = [
        at_least(
            "min_subgroup_sensitivity",
            context,
            row["sensitivity"],
            rules.min_subgroup_sensitivity,
            f"{row['column']} {row['value']}, {row['n_malignant']} cancers",
        )
        for row in measured
    ]
    return worst_first(lines)


def _refusals(bundle: Bundle, limit: float | None) -> Iterator[RuleResult]:
    rule = bundle.abstention()
    if limit is not None and rule is not None:
        # A rule that was never measured holds nothing: no value, and the gate fails.
        share = rule.measured.get("gate", {}).get("all", {}).get("share")
        yield at_most("max_gate_refusals", "", share, limit)


def _engine_result(engine_sets: Sequence[EngineSet]) -> RuleResult:
    refused = [engine_set.device for engine_set in engine_sets if not engine_set.passed]
    value = "no engine set; run export_engine" if not engine_sets else f"refused on {refused}" if refused else "agrees"
    passed = bool(engine_sets) and not refused
    return RuleResult(rule="require_engine_parity", context="", value=value, limit="agrees with torch", passed=passed)


def _champion_lines(rules: GateRules, candidate: Bundle, champion: Bundle) -> Iterator[RuleResult]:
    """Whether the candidate can stand in for the champion at all."""
    missing = [context for context in champion.manifest.contexts if context not in candidate.manifest.contexts]
    if missing:
        value = f"lacks {', '.join(missing)}"
        yield RuleResult(rule="contexts", context="", value=value, limit="the champion's", passed=False)
    if rules.require_same_task:
        same = (candidate.task.classes, set(candidate.task.malignant)) == (
            champion.task.classes,
            set(champion.task.malignant),
        )
        value = f"{candidate.task.name}: {', '.join(candidate.task.classes)}"
        limit = f"the champion's {champion.task.name}: {', '.join(champion.task.classes)}"
        yield RuleResult(rule="require_same_task", context="", value=value, limit=limit, passed=same)


def check_gate(rules: GateRules, candidate: Bundle, champion: Bundle | None, evidence: Evidence) -> GateReport:
    """Judges a candidate by its gate-split metrics, beside the champion, by its engines and by its shadow traffic.

    Args:
        candidate: a verified bundle; a bundle whose hashes do not match cannot be loaded, so it never gets here.
        champion: the present champion; None before the first promotion: then absolute limits alone hold.

    Raises:
        ValueError: the rules name a context that the candidate lacks.
    """
    results = [RuleResult(rule="bundle_hashes", context="", value="match", limit="match", passed=True)]
    contexts = rules.contexts or candidate.manifest.contexts
    shared = [context for context in contexts if champion is not None and context in champion.manifest.contexts]
    # Of a model whose risks are for another prevalence, training leaves calibration in the large out.
    in_the_large = candidate.manifest.training.get("build", {}).get("prevalence") is None
    if champion is not None:
        results.append(pairing_line(rules, evidence, shared))
    for context in contexts:
        report = candidate.metrics(context)
        results += _metric_lines(rules, context, report["gate"], in_the_large)
        results += _subgroup_lines(rules, context, report)
        if rules.max_auc_mismatch is not None and context in evidence.gate_auc:
            stated, measured = metric(report["gate"], "auc"), evidence.gate_auc[context]
            gap = None if stated is None else abs(stated - measured)
            results.append(at_most("max_auc_mismatch", context, gap, rules.max_auc_mismatch, f"here {measured:.4f}"))
        if champion is None or context not in shared:
            continue
        if context in evidence.comparisons:
            results += paired_lines(rules, context, evidence.comparisons[context])
        else:
            results += unpaired_lines(rules, context, report["gate"], champion.metrics(context)["gate"])
    if champion is not None:
        results += _champion_lines(rules, candidate, champion)
        results += shadow_lines(rules.shadow, evidence.shadow)
    results += _refusals(candidate, rules.max_gate_refusals)
    if "image" in candidate.manifest.modalities:
        if rules.require_engine_parity:
            results.append(_engine_result(evidence.engine_sets))
        results += latency_lines(rules, evidence)
    return GateReport(
        bundle_digest=candidate.digest,
        champion_digest=champion.digest if champion else None,
        dataset_digest=evidence.dataset_digest,
        paired=bool(shared) and all(context in evidence.comparisons for context in shared),
        results=results,
    )
