"""The promotion gate's rules in words, for people who did not write them."""

from __future__ import annotations

_WORDS = {
    "bundle_hashes": "The files are those that were trained",
    "contexts": "It answers wherever the champion does",
    "require_paired": "Both models were measured on the same lesions",
    "min_malignant": "Enough cancers to judge by",
    "min_auc": "AUC",
    "min_auc_low": "AUC, low end of its interval",
    "min_pauc": "Partial AUC",
    "min_pauc_low": "Partial AUC, low end of its interval",
    "min_sensitivity": "Share of cancers found at its threshold",
    "min_calibration_slope": "Risks are not too extreme",
    "max_calibration_slope": "Risks are not too timid",
    "max_calibration_intercept": "Risks are right on average",
    "min_subgroup_sensitivity": "Share of cancers found in the worst subgroup",
    "max_gate_refusals": "Share of pictures without an answer",
    "require_engine_parity": "The engines compute what was trained",
    "max_ms_per_image": "Time per picture",
    "max_latency_ratio": "Time per picture, beside the champion's",
    "require_same_task": "It has the champion's classes",
    "max_auc_drop": "AUC, loss against the champion",
    "max_auc_drop_high": "AUC, worse end of the loss",
    "max_pauc_drop": "Partial AUC, loss against the champion",
    "max_pauc_drop_high": "Partial AUC, worse end of the loss",
    "require_superiority": "Better than the champion by more than chance",
    "max_sensitivity_drop": "Cancers found, loss against the champion",
    "max_specificity_drop": "Healthy lesions cleared, loss against the champion",
    "max_subgroup_sensitivity_drop": "Cancers found in the worst subgroup, loss",
    "max_auc_mismatch": "Measured again, its AUC is the one it states",
    "shadow.required": "It scored live traffic as a shadow",
    "shadow.min_pairs": "Enough live lesions that both scored",
    "shadow.min_rank_correlation": "Live lesions are ranked alike",
    "shadow.max_band_changes": "Live lesions that change their band",
    "shadow.max_lowered": "Live lesions that only the champion flags",
    "shadow.max_raised": "Live lesions that only the candidate flags",
    "shadow.max_abstained": "Live lesions that only the candidate leaves unanswered",
}


def rule_words(rule: str) -> str:
    """A rule in words; its own name where there are none."""
    return _WORDS.get(rule, rule)
