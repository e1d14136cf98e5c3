"""The gate's lines about a candidate beside the champion: same lesions, engines' speed, shadow traffic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling.engine_set import EngineSet
from modeling.paired_comparison import Difference, PairedComparison
from monitoring.gate_rules import GateRules, RuleResult, ShadowRules, at_least, at_most, worst_first
from store.shadow_agreement import ShadowAgreement

# The batches of a single request and of a busy service.
_TIMED_BATCHES = (1, 8)


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate beside its bundle.

    Attributes:
        engine_sets, champion_engine_sets: one per device.
        comparisons: context -> both models on the same lesions; empty where they were not compared so.
        unpaired: why not.
        gate_auc: context -> the candidate's AUC on its whole gate split, measured again.
        dataset_digest: of the version whose gate split both scored.
        shadow: the candidate as the champion's shadow; None where nobody asked the store.
    """

    engine_sets: Sequence[EngineSet] = ()
    champion_engine_sets: Sequence[EngineSet] = ()
    comparisons: Mapping[str, PairedComparison] = field(default_factory=dict)
    unpaired: str = "no data set given"
    gate_auc: Mapping[str, float] = field(default_factory=dict)
    dataset_digest: str | None = None
    shadow: ShadowAgreement | None = None


def pairing_line(rules: GateRules, evidence: Evidence, contexts: Sequence[str]) -> RuleResult:
    """Whether all `contexts`, which both models have, were compared on the same lesions."""
    paired = bool(contexts) and all(context in evidence.comparisons for context in contexts)
    if paired:
        first = evidence.comparisons[contexts[0]]
        value = f"{first.n} lesions, {first.n_malignant} malignant"
        detail = f"{first.malignant_groups} patients or groups with cancer"
    else:
        value, detail = f"unpaired: {evidence.unpaired}", ""
    limit = "both models on the same lesions" if rules.require_paired else "not required"
    passed = paired or not rules.require_paired
    return RuleResult(rule="require_paired", context="", value=value, limit=limit, passed=passed, detail=detail)


def unpaired_lines(
    rules: GateRules, context: str, metrics: Mapping[str, Any], champion: Mapping[str, Any]
) -> Iterator[RuleResult]:
    """The two bundles' own figures, each on its own gate split."""
    asked = [("max_auc_drop", "auc"), ("max_pauc_drop", "pauc")]
    asked += [("max_sensitivity_drop", "sensitivity"), ("max_specificity_drop", "specificity")]
    for rule, name in asked:
        limit, new, old = getattr(rules, rule), metric(metrics, name), metric(champion, name)
        if limit is None or old is None:
            continue  # a champion that could not be measured is no bar
        yield at_most(rule, context, None if new is None else old - new, limit, "unpaired")


def metric(metrics: Mapping[str, Any], name: str, part: str = "value") -> float | None:
    """A figure of a bundle's metrics, or an end of its interval."""
    value = metrics.get(name)
    value = value.get(part) if isinstance(value, dict) else value
    return None if value is None else float(value)


def _drop(difference: Difference, end: float | None) -> float | None:
    """How much the candidate lost, of a gain or of its low end."""
    return None if difference.value is None or end is None else -end


def _interval(difference: Difference) -> str:
    figures = "" if difference.champion is None else f"{difference.champion:.4g} -> "
    figures += "?" if difference.candidate is None else f"{difference.candidate:.4g}"
    if difference.low is None or difference.high is None:
        return f"{figures}, no interval"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    low, high = (round(-end, 4) + 0.0 for end in (difference.high, difference.low))
    return f"{figures}, drop's 95 % interval {low:+.4f} to {high:+.4f}"


def paired_lines(rules: GateRules, context: str, comparison: PairedComparison) -> Iterator[RuleResult]:
    """Both models on the same lesions of the gate split."""
    enough = comparison.malignant_groups >= rules.interval_from
    for name in ("auc", "pauc"):
        difference: Difference = getattr(comparison, name)
        if difference.champion is None:
            continue  # no malignant or no benign lesion: min_malignant and min_auc say so
        limit = getattr(rules, f"max_{name}_drop")
        if limit is not None:
            yield at_most(
                f"max_{name}_drop", context, _drop(difference, difference.value), limit, _interval(difference)
            )
        high = getattr(rules, f"max_{name}_drop_high")
        if high is not None and enough:
            yield at_most(f"max_{name}_drop_high", context, _drop(difference, difference.low), high)
        elif high is not None:
            value = f"{comparison.malignant_groups} patients or groups with cancer"
            limit_text = f"not judged below {rules.interval_from}"
            yield RuleResult(rule=f"max_{name}_drop_high", context=context, value=value, limit=limit_text, passed=True)
    if rules.require_superiority:
        low = comparison.pauc.low
        passed = low is not None and low > 0
        detail = _interval(comparison.pauc)
        yield RuleResult(
            rule="require_superiority", context=context, value=low, limit="> 0", passed=passed, detail=detail
        )
    cancers = f"; only the candidate finds {comparison.gained}, only the champion {comparison.lost}"
    for name, counts in (("sensitivity", cancers), ("specificity", "")):
        difference = getattr(comparison, name)
        limit = getattr(rules, f"max_{name}_drop")
        if limit is not None and difference.champion is not None:
            drop = _drop(difference, difference.value)
            yield at_most(f"max_{name}_drop", context, drop, limit, _interval(difference) + counts)
    if rules.max_subgroup_sensitivity_drop is not None:
        lines = [
            at_most(
                "max_subgroup_sensitivity_drop",
                context,
                pair.champion - pair.candidate,
                rules.max_subgroup_sensitivity_drop,
                f"{pair.column} {pair.value}, {pair.n_malignant} cancers: {pair.champion:.3g} -> {pair.candidate:.3g}",
            )
            for pair in sorted(comparison.subgroups, key=lambda pair: pair.candidate - pair.champion)
        ]
        yield from worst_first(lines)


def latency_lines(rules: GateRules, evidence: Evidence) -> Iterator[RuleResult]:
    """The slowest device of each batch size, in itself and beside the champion's engine on the same device."""
    champion = {(each.device, each.cores): each for each in evidence.champion_engine_sets}
    for batch in _TIMED_BATCHES:
        timed = [(each, _chosen_ms(each, batch)) for each in evidence.engine_sets]
        known = [(each, ms) for each, ms in timed if ms is not None]
        where = f"batch {batch}"
        if rules.max_ms_per_image is not None:
            slowest = max(known, key=lambda pair: pair[1], default=None)
            yield at_most(
                "max_ms_per_image",
                where,
                None if slowest is None else slowest[1],
                rules.max_ms_per_image,
                "" if slowest is None else slowest[0].device,
            )
        if rules.max_latency_ratio is None:
            continue
        ratios = []
        for each, ms in known:
            other = champion.get((each.device, each.cores))
            before = None if other is None else _chosen_ms(other, batch)
            if before:
                ratios.append((ms / before, f"{before:.3g} -> {ms:.3g} ms per image on {each.device}"))
        if ratios:
            ratio, detail = max(ratios)
            yield at_most("max_latency_ratio", where, ratio, rules.max_latency_ratio, detail)


def _chosen_ms(engine_set: EngineSet, batch: int) -> float | None:
    name = engine_set.chosen.get(batch)
    report = next((report for report in engine_set.candidates if report.candidate.name == name), None)
    return None if report is None else report.ms_per_image.get(batch)


def shadow_lines(rules: ShadowRules, shadow: ShadowAgreement | None) -> Iterator[RuleResult]:
    """How the candidate answered copies of the traffic, where it ran as the champion's shadow."""
    pairs = 0 if shadow is None else shadow.pairs
    if shadow is None or pairs < rules.min_pairs:
        if pairs or rules.required:
            limit = f">= {rules.min_pairs}" if rules.required else f"not judged below {rules.min_pairs}"
            value = f"{pairs} lesions that both scored in {rules.days} days"
            yield RuleResult(rule="shadow.min_pairs", context="", value=value, limit=limit, passed=not rules.required)
        return
    yield at_least("shadow.min_pairs", "", float(pairs), rules.min_pairs)
    correlation = rules.min_rank_correlation
    if correlation is not None:
        yield at_least("shadow.min_rank_correlation", "", shadow.rank_correlation, correlation)
    changes = None if shadow.same_band is None else 1 - shadow.same_band
    abstained = shadow.shadow_abstained / (pairs + shadow.shadow_abstained)
    for name, value in (
        ("max_band_changes", changes),
        ("max_lowered", shadow.lowered),
        ("max_raised", shadow.raised),
        ("max_abstained", abstained),
    ):
        limit = getattr(rules, name)
        if limit is not None:
            yield at_most(f"shadow.{name}", "", value, limit)
