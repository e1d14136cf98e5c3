"""What the page of models shows: a candidate beside the champion, figure by figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitoring.gate_rules import RuleResult
from serve.rule_words import rule_words
from store.model_facts import Facts

# Figures of the gate split: name, words, lowest and highest value of the axis that its interval is drawn on.
_METRICS: tuple[tuple[str, str, float, float], ...] = (
    ("auc", "AUC", 0.5, 1.0),
    ("pauc", "Partial AUC above 80 % sensitivity (at most 0.2)", 0.0, 0.2),
    ("sensitivity", "Cancers found at its threshold", 0.5, 1.0),
    ("specificity", "Healthy lesions cleared at its threshold", 0.0, 1.0),
    ("calibration_slope", "Calibration slope (1 is right)", 0.0, 2.0),
    ("calibration_intercept", "Calibration intercept (0 is right)", -1.0, 1.0),
    ("ece", "Expected calibration error", 0.0, 0.2),
)
_WIDTH = 100.0
_PAIRED = ("auc", "pauc", "sensitivity", "specificity")
# What a risk rests on, the most first; for people who compare models, not lesions.
CONTEXTS = {
    "patient": "with metadata and the patient's other lesions",
    "none": "with metadata",
    "image_only": "from the picture alone",
}


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, and where they lie on an axis from 0 to 100; None where unknown."""

    value: float | None
    low: float | None = None
    high: float | None = None
    at: float | None = None
    start: float | None = None
    end: float | None = None

    @property
    def interval(self) -> str:
        """The interval in words; "" without one."""
        return "" if self.low is None or self.high is None else f"{self.low:.3f} to {self.high:.3f}"


@dataclass(frozen=True)
class MetricRow:
    """One figure of two models; `difference`: candidate minus champion on the same lesions, with its interval."""

    words: str
    candidate: Estimate
    champion: Estimate
    difference: tuple[str, str]


@dataclass(frozen=True)
class SubgroupRow:
    """Share of cancers found in a subgroup; `worse`: less than the champion finds."""

    column: str
    value: str
    number: int
    malignant: int
    candidate: float | None
    champion: float | None
    worse: bool


@dataclass(frozen=True)
class ContextView:
    """Two models in one context; `lesions`: what the candidate was measured on."""

    words: str
    lesions: str
    metrics: Sequence[MetricRow]
    subgroups: Sequence[SubgroupRow]


@dataclass(frozen=True)
class RuleRow:
    """A line of the gate's table."""

    words: str
    rule: str
    context: str
    value: str
    limit: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class EngineRow:
    """An engine on one device; `chosen`: batch sizes that run on it."""

    name: str
    precision: str
    passed: bool
    reason: str
    milliseconds: str
    throughput: str
    chosen: str


def _number(metrics: Mapping[str, Any], name: str) -> tuple[float | None, float | None, float | None]:
    found = metrics.get(name)
    bounds = found if isinstance(found, Mapping) else metrics.get("intervals", {}).get(name, {})
    value = found.get("value") if isinstance(found, Mapping) else found
    return value, bounds.get("low"), bounds.get("high")


def _estimate(metrics: Mapping[str, Any], name: str, low: float, high: float) -> Estimate:
    def place(value: float | None) -> float | None:
        return None if value is None else min(max((value - low) / (high - low), 0.0), 1.0) * _WIDTH

    value, below, above = _number(metrics, name)
    return Estimate(value, below, above, place(value), place(below), place(above))


def _difference(comparison: Mapping[str, Any], name: str) -> tuple[str, str]:
    found = comparison.get(name) if name in _PAIRED else None
    if not found or found["value"] is None:
        return "", ""
    interval = "" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"
    return f"{found['value']:+.3f}", interval


def context_views(candidate: Facts, champion: Facts) -> list[ContextView]:
    """The candidate's contexts; without a champion its columns are empty."""
    comparisons = (candidate.gate or {}).get("comparisons", {})
    views = []
    for name in sorted(candidate.report, key=list(CONTEXTS).index):
        report = candidate.report[name]
        gate, beside = report["gate"], champion.report.get(name, {})
        comparison = comparisons.get(name, {})
        metrics = [
            MetricRow(
                words,
                _estimate(gate, metric, low, high),
                _estimate(beside.get("gate", {}), metric, low, high),
                _difference(comparison, metric),
            )
            for metric, words, low, high in _METRICS
        ]
        lesions = f"{gate.get('n', 0):,} lesions, {gate.get('n_malignant', 0):,} of them cancer"
        if comparison:
            lesions += f". Of {comparison['n']:,} lesions that both scored, cancers that only the candidate finds: "
            lesions += f"{comparison['gained']}, that only the champion finds: {comparison['lost']}"
        rows = _subgroups(report["subgroups"], beside.get("subgroups", []), comparison)
        views.append(ContextView(CONTEXTS[name], lesions, metrics, rows))
    return views


def _subgroups(
    own: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any]
) -> list[SubgroupRow]:
    """Subgroups with enough cancers to say something, those first where the candidate finds least."""
    champions = {(row["column"], row["value"]): row["sensitivity"] for row in beside}
    pairs = {(row["column"], row["value"]): row for row in comparison.get("subgroups", [])}
    rows = []
    for row in own:
        key = (row["column"], row["value"])
        mine, theirs = row["sensitivity"], champions.get(key)
        if key in pairs:
            mine, theirs = pairs[key]["candidate"], pairs[key]["champion"]
        if mine is not None:
            worse = theirs is not None and mine < theirs
            rows.append(SubgroupRow(*key, row["n"], row["n_malignant"], mine, theirs, worse))
    return sorted(rows, key=lambda row: (row.candidate or 0.0, row.column, row.value))


def rule_rows(gate: Mapping[str, Any]) -> list[RuleRow]:
    """The gate's table, failed rules first."""
    results = [RuleResult.model_validate(row) for row in gate.get("results", [])]
    rows = [
        RuleRow(
            rule_words(found.rule),
            found.rule,
            CONTEXTS.get(found.context, found.context),
            found.shown,
            found.limit.replace(">=", "at least").replace("<=", "at most"),
            found.passed,
            found.detail.replace("->", "→"),
        )
        for found in results
    ]
    return sorted(rows, key=lambda row: row.passed)


def engine_rows(engine_set: Mapping[str, Any]) -> list[EngineRow]:
    """The engines that were tried on one device, the chosen ones first."""
    chosen: dict[str, list[int]] = {}
    for batch, name in engine_set["chosen"].items():
        chosen.setdefault(name, []).append(int(batch))
    rows = []
    for report in engine_set["candidates"]:
        name = report["candidate"]["name"]
        batches = ", ".join(map(str, sorted(chosen.get(name, []))))
        rows.append(
            EngineRow(
                name,
                report["candidate"]["precision"],
                report["passed"],
                report["reason"],
                _by_batch(report["ms_per_image"], "{:.2f} ms"),
                _by_batch(report["images_per_second"], "{:,.0f}/s"),
                batches,
            )
        )
    return sorted(rows, key=lambda row: (not row.chosen, not row.passed, row.name))


def _by_batch(values: Mapping[str, float], pattern: str) -> str:
    """A figure at the smallest and the largest batch."""
    batches = sorted(map(int, values))
    ends = batches if len(batches) < 2 else [batches[0], batches[-1]]
    return ", ".join(f"{pattern.format(values[str(batch)])} at {batch}" for batch in ends)
