"""Limits that a candidate is held to before it may become the champion, and the line that says how it did."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modeling.schema import Context


class ShadowRules(BaseModel):
    """Limits on how far a candidate that ran as a shadow may differ from the champion in traffic; None = off.

    Attributes:
        required: a candidate that has not run as a shadow is refused; otherwise only one that has is judged.
        days: newest days of the log that are looked at.
        min_pairs: lesions that both scored; fewer are not judged.
        min_rank_correlation: Spearman's, of the risks.
        max_band_changes: share of the lesions that change band.
        max_lowered: share that the champion flags and the candidate does not.
        max_raised: share that only the candidate flags.
        max_abstained: share from which only the candidate abstains.
    """

    model_config = ConfigDict(extra="forbid")

    required: bool = False
    days: int = Field(30, ge=1, le=3650)
    min_pairs: int = Field(200, ge=2)
    min_rank_correlation: float | None = Field(0.5, ge=-1, le=1)
    max_band_changes: float | None = Field(0.4, ge=0, le=1)
    max_lowered: float | None = Field(0.05, ge=0, le=1)
    max_raised: float | None = Field(0.2, ge=0, le=1)
    max_abstained: float | None = Field(0.05, ge=0, le=1)


class GateRules(BaseModel):
    """Limits of the gate; None switches a rule off. `..._low` and `..._high` limit an end of the 95 % interval.

    Attributes:
        contexts: which contexts are judged; None = all of the bundle.
        min_malignant: fewer cancers in the gate split than this prove nothing.
        min_sensitivity: at the operating threshold, which was chosen on out-of-fold predictions.
        min_calibration_slope, max_calibration_slope: 1 is ideal; below 1 the risks are too extreme.
        max_calibration_intercept: calibration in the large, absolute; 0.7 is twice the odds. Not asked of a bundle
            whose risks are for another prevalence than the gate split's.
        min_subgroup_sensitivity: at the operating threshold, in every subgroup with at least 10 malignant lesions.
        max_gate_refusals: share of the gate split's pictures that the abstention rule may refuse: metrics count them
            all, but for these a user gets no answer. Not asked of a bundle without such a rule.
        require_engine_parity: an engine set must exist, and every device's must hold an engine that agrees with torch.
            Not asked of a bundle without an image model.
        max_ms_per_image: of the engine chosen for batches of 1 and 8.
        max_latency_ratio: the same beside the champion's on the same device. Not asked where either was not timed.
        require_same_task: a champion of other classes is not replaced: callers would read the answers wrongly.
        require_paired: both models must have been scored on the same lesions; None = when a data set is given.
        max_auc_drop, max_pauc_drop: how much worse than the champion the point estimate may be.
        max_auc_drop_high, max_pauc_drop_high: the same for the upper end of the paired interval: the candidate has to
            show that it is not worse by more. Asked from `interval_from` patients with a malignant lesion on, and of
            no unpaired comparison: below, an interval is so wide that it would refuse everyone.
        require_superiority: the paired interval of the pAUC's gain must lie above 0.
        max_sensitivity_drop, max_specificity_drop: each model at its own operating threshold, point estimate.
        max_subgroup_sensitivity_drop: the same in every subgroup with at least 10 malignant lesions; paired only.
        max_auc_mismatch: the AUC that the bundle states and the one measured again here may differ by so much.
    """

    model_config = ConfigDict(extra="forbid")

    contexts: list[Context] | None = None
    min_malignant: int | None = Field(20, ge=1)
    min_auc: float | None = Field(0.75, ge=0, le=1)
    min_auc_low: float | None = Field(0.65, ge=0, le=1)
    min_pauc: float | None = Field(None, ge=0, le=0.2)
    min_pauc_low: float | None = Field(None, ge=0, le=0.2)
    min_sensitivity: float | None = Field(0.8, ge=0, le=1)
    min_calibration_slope: float | None = Field(0.5, gt=0)
    max_calibration_slope: float | None = Field(2.0, gt=0)
    max_calibration_intercept: float | None = Field(0.7, gt=0)
    min_subgroup_sensitivity: float | None = Field(0.6, ge=0, le=1)
    max_gate_refusals: float | None = Field(0.05, ge=0, le=1)
    require_engine_parity: bool = True
    max_ms_per_image: float | None = Field(None, gt=0)
    max_latency_ratio: float | None = Field(2.0, gt=0)
    require_same_task: bool = True
    require_paired: bool | None = None
    interval_from: int = Field(100, ge=10)
    max_auc_drop: float | None = Field(0.02, ge=0, le=1)
    max_auc_drop_high: float | None = Field(0.03, ge=0, le=1)
    max_pauc_drop: float | None = Field(0.01, ge=0, le=0.2)
    max_pauc_drop_high: float | None = Field(0.02, ge=0, le=0.2)
    require_superiority: bool = False
    max_sensitivity_drop: float | None = Field(0.0, ge=0, le=1)
    max_specificity_drop: float | None = Field(0.1, ge=0, le=1)
    max_subgroup_sensitivity_drop: float | None = Field(0.2, ge=0, le=1)
    max_auc_mismatch: float | None = Field(0.001, gt=0, le=1)
    shadow: ShadowRules = Field(default_factory=ShadowRules)

    @model_validator(mode="after")
    def _ordered(self) -> GateRules:
        low, high = self.min_calibration_slope, self.max_calibration_slope
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_calibration_slope {low} is above max_calibration_slope {high}")
        return self


class RuleResult(BaseModel):
    """One line of the gate's table; `value` is None where nothing could be measured. `detail` holds the interval, the
    counts behind the value, or the subgroup."""

    rule: str
    context: str
    value: float | str | None
    limit: str
    passed: bool
    detail: str = ""

    @property
    def shown(self) -> str:
        """The value in words."""
        if self.value is None:
            return "not measurable"
        return f"{self.value:.4g}" if isinstance(self.value, float) else self.value

    def __str__(self) -> str:
        where = f" ({self.context})" if self.context else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.rule}{where} = {self.shown}, required {self.limit}{detail}"


def at_least(rule: str, context: str, value: float | None, limit: float, detail: str = "") -> RuleResult:
    """A line that passes from `limit` on; what could not be measured fails."""
    passed = value is not None and value >= limit
    return RuleResult(rule=rule, context=context, value=value, limit=f">= {limit:g}", passed=passed, detail=detail)


def at_most(rule: str, context: str, value: float | None, limit: float, detail: str = "") -> RuleResult:
    """A line that passes up to `limit`; what could not be measured fails. Rounded, so that 0.90 - 0.88 is 0.02."""
    value = None if value is None else round(value, 9)
    passed = value is not None and value <= limit
    return RuleResult(rule=rule, context=context, value=value, limit=f"<= {limit:g}", passed=passed, detail=detail)


def worst_first(lines: list[RuleResult]) -> list[RuleResult]:
    """Of one rule's lines, worst first, about many subgroups: those that fail, or the worst one where none does."""
    return [line for line in lines if not line.passed] or lines[:1]
