"""The quality gate: rules a candidate must pass before it may become the champion, and the table of what it did.

Metrics are those of the gate split, which trained nothing. A figure that cannot be measured fails its rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modeling.bundle import Bundle
from modeling.engine_set import EngineSet
from modeling.schema import Context


class GateRules(BaseModel):
    """Limits of the gate; None switches a rule off. `..._low` limits the lower end of the 95 % interval.

    Attributes:
        contexts: which contexts are judged; None = all of the bundle.
        min_malignant: fewer cancers in the gate split than this prove nothing.
        min_sensitivity: at the operating threshold, which was chosen on out-of-fold predictions.
        max_auc_drop, max_pauc_drop: how much worse than the champion the point estimate may be.
        min_calibration_slope, max_calibration_slope: 1 is ideal; below 1 the risks are too extreme.
        max_gate_refusals: share of the gate split's pictures that the abstention rule may refuse: metrics count them
            all, but for these a user gets no answer. Not asked of a bundle without such a rule.
        require_engine_parity: an engine set must exist, and every device's must hold an engine that agrees with torch.
            Not asked of a bundle without an image model.
        require_same_task: a champion of other classes is not replaced: callers would read the answers wrongly.
    """

    model_config = ConfigDict(extra="forbid")

    contexts: list[Context] | None = None
    min_malignant: int | None = Field(20, ge=1)
    min_auc: float | None = Field(0.75, ge=0, le=1)
    min_auc_low: float | None = Field(0.65, ge=0, le=1)
    min_pauc: float | None = Field(None, ge=0, le=0.2)
    min_pauc_low: float | None = Field(None, ge=0, le=0.2)
    min_sensitivity: float | None = Field(0.8, ge=0, le=1)
    max_auc_drop: float | None = Field(0.02, ge=0, le=1)
    max_pauc_drop: float | None = Field(0.01, ge=0, le=0.2)
    min_calibration_slope: float | None = Field(0.5, gt=0)
    max_calibration_slope: float | None = Field(2.0, gt=0)
    max_gate_refusals: float | None = Field(0.05, ge=0, le=1)
    require_engine_parity: bool = True
    require_same_task: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> GateRules:
        low, high = self.min_calibration_slope, self.max_calibration_slope
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_calibration_slope {low} is above max_calibration_slope {high}")
        return self


class RuleResult(BaseModel):
    """One line of the gate's table; `value` is None where nothing could be measured."""

    rule: str
    context: str
    value: float | str | None
    limit: str
    passed: bool

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        where = f" ({self.context})" if self.context else ""
        return f"{self.rule}{where} = {'not measurable' if value is None else value}, required {self.limit}"


class GateReport(BaseModel):
    """The verdict on one bundle, with every rule's value and limit."""

    bundle_digest: str
    champion_digest: str | None
    results: list[RuleResult]

    @property
    def failed(self) -> list[RuleResult]:
        return [result for result in self.results if not result.passed]

    @property
    def passed(self) -> bool:
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """What the registry keeps: `passed`, digests and the table."""
        return {"passed": self.passed, **self.model_dump(mode="json")}


def _value(metrics: dict[str, Any], name: str, part: str = "value") -> float | None:
    value = metrics.get(name)
    value = value.get(part) if isinstance(value, dict) else value
    return None if value is None else float(value)


def _at_least(rule: str, context: str, value: float | None, limit: float) -> RuleResult:
    passed = value is not None and value >= limit
    return RuleResult(rule=rule, context=context, value=value, limit=f">= {limit:g}", passed=passed)


def _at_most(rule: str, context: str, value: float | None, limit: float) -> RuleResult:
    passed = value is not None and value <= limit
    return RuleResult(rule=rule, context=context, value=value, limit=f"<= {limit:g}", passed=passed)


def _metric_results(rules: GateRules, context: str, metrics: dict[str, Any]) -> Iterator[RuleResult]:
    minima = [
        ("min_malignant", _value(metrics, "n_malignant")),
        ("min_auc", _value(metrics, "auc")),
        ("min_auc_low", _value(metrics, "auc", "low")),
        ("min_pauc", _value(metrics, "pauc")),
        ("min_pauc_low", _value(metrics, "pauc", "low")),
        ("min_sensitivity", _value(metrics, "sensitivity")),
        ("min_calibration_slope", _value(metrics, "calibration_slope")),
    ]
    for rule, value in minima:
        limit = getattr(rules, rule)
        if limit is not None:
            yield _at_least(rule, context, value, limit)
    if rules.max_calibration_slope is not None:
        slope = _value(metrics, "calibration_slope")
        yield _at_most("max_calibration_slope", context, slope, rules.max_calibration_slope)


def _comparison_results(
    rules: GateRules, context: str, metrics: dict[str, Any], champion: dict[str, Any]
) -> Iterator[RuleResult]:
    for rule, name in (("max_auc_drop", "auc"), ("max_pauc_drop", "pauc")):
        limit, new, old = getattr(rules, rule), _value(metrics, name), _value(champion, name)
        if limit is None or old is None:
            continue  # a champion that could not be measured is no bar
        # Rounding keeps 0.90 - 0.88 from failing a limit of 0.02.
        yield _at_most(rule, context, None if new is None else round(old - new, 9), limit)


def _refusals(bundle: Bundle, limit: float | None) -> Iterator[RuleResult]:
    rule = bundle.abstention()
    if limit is not None and rule is not None:
        # A rule that was never measured holds nothing: no value, and the gate fails.
        share = rule.measured.get("gate", {}).get("all", {}).get("share")
        yield _at_most("max_gate_refusals", "", share, limit)


def _engine_result(engine_sets: Sequence[EngineSet]) -> RuleResult:
    refused = [engine_set.device for engine_set in engine_sets if not engine_set.passed]
    value = "no engine set; run export_engine" if not engine_sets else f"refused on {refused}" if refused else "agrees"
    passed = bool(engine_sets) and not refused
    return RuleResult(rule="require_engine_parity", context="", value=value, limit="agrees with torch", passed=passed)


def check_gate(
    rules: GateRules, candidate: Bundle, champion: Bundle | None, engine_sets: Sequence[EngineSet]
) -> GateReport:
    """Judges a candidate by its gate-split metrics, against the champion and by its engines.

    Args:
        candidate: a verified bundle; a bundle whose hashes do not match cannot be loaded, so it never gets here.
        champion: the present champion; None before the first promotion.
        engine_sets: the candidate's engine sets, one per device.

    Raises:
        ValueError: the rules name a context that the candidate lacks.
    """
    results = [RuleResult(rule="bundle_hashes", context="", value="match", limit="match", passed=True)]
    for context in rules.contexts or candidate.manifest.contexts:
        metrics = candidate.metrics(context)["gate"]
        results += _metric_results(rules, context, metrics)
        if champion is not None and context in champion.manifest.contexts:
            results += _comparison_results(rules, context, metrics, champion.metrics(context)["gate"])
    if champion is not None:
        missing = [context for context in champion.manifest.contexts if context not in candidate.manifest.contexts]
        if missing:
            value = f"lacks {', '.join(missing)}"
            results.append(RuleResult(rule="contexts", context="", value=value, limit="the champion's", passed=False))
        if rules.require_same_task:
            same = (candidate.task.classes, candidate.task.malignant) == (
                champion.task.classes,
                champion.task.malignant,
            )
            value = f"{candidate.task.name}: {', '.join(candidate.task.classes)}"
            limit = f"the champion's {champion.task.name}: {', '.join(champion.task.classes)}"
            results.append(RuleResult(rule="require_same_task", context="", value=value, limit=limit, passed=same))
    results += _refusals(candidate, rules.max_gate_refusals)
    if rules.require_engine_parity and "image" in candidate.manifest.modalities:
        results.append(_engine_result(engine_sets))
    return GateReport(
        bundle_digest=candidate.digest, champion_digest=champion.digest if champion else None, results=results
    )
