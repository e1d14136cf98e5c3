"""What a clinician asks of a detector: net benefit, lesions looked at per cancer found, and how each subgroup fares.

Every table is JSON-ready; what cannot be measured is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling.metrics import partial_auc_above_tpr, roc_auc, sensitivity_specificity
from modeling.patient_relative import group_codes, is_missing
from modeling.schema import TaskSpec

# Threshold probabilities of a decision curve: one biopsy in 1,000 to one in 20 finding a cancer is worth it.
NET_BENEFIT_THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05)
# Where more lesions than that are malignant, as in a clinic's, all of the above are near treating every lesion.
HIGH_THRESHOLDS = (0.1, 0.2, 0.3, 0.5)
# A sensitivity of fewer cancers, or a specificity of fewer benign lesions, says more about the draw than the subgroup.
MIN_SUBGROUP = 10
AGE_EDGES = (30, 45, 60, 75)
_AGE_COLUMNS = ("age_approx", "age")
_SKIN_COLUMNS = ("tbp_lv_Lext", "tbp_lv_Bext")
# Chardon, Cretois & Hourseau 1991: individual typology angle in degrees, from light to dark.
ITA_EDGES = (-30.0, 10.0, 28.0, 41.0, 55.0)
ITA_NAMES = ("dark", "brown", "tan", "intermediate", "light", "very light")


def net_benefit(
    malignant: np.ndarray, risks: np.ndarray, thresholds: Sequence[float] | None = None, prevalence: float | None = None
) -> list[dict[str, float]]:
    """Decision-curve analysis (Vickers & Elkin 2006): true positives per lesion less false positives, weighted by the
    odds of the threshold, for the model and for treating every lesion; treating none is 0.

    Args:
        malignant: bool (N,).
        risks: calibrated P(malignant) float (N,).
        thresholds: in (0, 1): the risk from which one would act; None = NET_BENEFIT_THRESHOLDS, and HIGH_THRESHOLDS
            where the share of malignant lesions is above all of those.
        prevalence: share of malignant lesions where the model is used; None = that of these.

    Returns:
        Rows {threshold, model, treat_all}; none where a prevalence is given and these are all malignant or all benign.
    """
    if prevalence is not None and (malignant.all() or not malignant.any()):
        return []
    share = float(np.mean(malignant)) if prevalence is None else prevalence
    weights = _weights(malignant, prevalence)
    if thresholds is None:
        thresholds = NET_BENEFIT_THRESHOLDS + (HIGH_THRESHOLDS if share > NET_BENEFIT_THRESHOLDS[-1] else ())
    rows = []
    for threshold in thresholds:
        acted = risks >= threshold
        odds = threshold / (1 - threshold)
        model = float(np.sum(weights * (acted & malignant)) - odds * np.sum(weights * (acted & ~malignant)))
        rows.append({"threshold": threshold, "model": model, "treat_all": share - odds * (1 - share)})
    return rows


def _weights(malignant: np.ndarray, prevalence: float | None) -> np.ndarray:
    """What each lesion counts, float64 (N,) with sum 1, so that the malignant ones count `prevalence` together."""
    if prevalence is None:
        return np.full(len(malignant), 1 / max(len(malignant), 1))
    counts = np.where(malignant, malignant.sum(), (~malignant).sum())
    return np.where(malignant, prevalence, 1 - prevalence) / counts


def needed_to_triage(
    malignant: np.ndarray, risks: np.ndarray, threshold: float, prevalence: float | None = None
) -> float | None:
    """Lesions looked at per cancer found when all with risk >= threshold are; None where none is found, or a prevalence
    is given and all lesions are malignant."""
    acted = risks >= threshold
    if not (acted & malignant).any() or (prevalence is not None and malignant.all()):
        return None
    weights = _weights(malignant, prevalence)
    return float(weights[acted].sum() / weights[acted & malignant].sum())


def top_retrieval(malignant: np.ndarray, risks: np.ndarray, patients: Sequence, count: int = 15) -> dict[str, Any]:
    """Of the cancers of patients with more than `count` lesions, how many are among the patient's `count` riskiest.

    Ties count against the model: a cancer is found only if fewer than `count` other lesions have its risk or more.

    Args:
        patients: patient id of each row (N,).
    """
    codes = group_codes(patients)
    order = np.lexsort((malignant, -risks, codes))
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(order)))
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    asked = malignant[order] & (np.repeat(sizes, sizes) > count)
    found = int((asked & (rank < count)).sum())
    total = int(asked.sum())
    return {"count": count, "n_malignant": total, "found": found, "share": found / total if total else None}


def age_bands(ages: Sequence) -> list[str | None]:
    """Age bands in years, e.g. "45-59"; None where missing."""
    numbers = np.asarray(ages, dtype=np.float64)
    names = [f"under {AGE_EDGES[0]}"]
    names += [f"{low}-{high - 1}" for low, high in zip(AGE_EDGES, AGE_EDGES[1:], strict=False)]
    names.append(f"{AGE_EDGES[-1]} and over")
    return [None if np.isnan(age) else names[int(np.searchsorted(AGE_EDGES, age, side="right"))] for age in numbers]


def skin_tones(lightness: Sequence, b: Sequence) -> list[str | None]:
    """Skin tone by individual typology angle, `degrees(atan2(L* - 50, b*))`, of the skin around a lesion."""
    angles = np.degrees(np.arctan2(np.asarray(lightness, np.float64) - 50.0, np.asarray(b, np.float64)))
    return [None if np.isnan(angle) else ITA_NAMES[int(np.searchsorted(ITA_EDGES, angle))] for angle in angles]


def subgroup_columns(task: TaskSpec, lesions: Mapping[str, Sequence]) -> dict[str, Sequence]:
    """What a report looks at separately: the task's subgroups, body site, institution, age band and skin tone.

    Args:
        lesions: column name -> value of each lesion (N,), as a data frame has them.
    """
    names = [*task.subgroup_columns, task.site_column, task.institution_column]
    columns: dict[str, Sequence] = {
        name: np.asarray(lesions[name]) for name in dict.fromkeys(names) if name is not None
    }
    for name in _AGE_COLUMNS:
        if name in task.numeric_columns:
            columns["age"] = age_bands(lesions[name])
            break
    if set(_SKIN_COLUMNS) <= set(task.numeric_columns):
        columns["skin tone"] = skin_tones(*(lesions[name] for name in _SKIN_COLUMNS))
    return columns


def subgroup_table(
    malignant: np.ndarray, risks: np.ndarray, threshold: float, columns: Mapping[str, Sequence]
) -> list[dict[str, Any]]:
    """One row per value of each column, most lesions first: n, n_malignant, auc, pauc, sensitivity, specificity.

    With fewer than 10 malignant or 10 benign lesions the measures that need them are None.

    Args:
        columns: subgroup name -> value of each lesion (N,); missing values form the row "(missing)".
    """
    table = []
    for column, values in columns.items():
        names = np.array(["(missing)" if is_missing(value) else str(value) for value in values], dtype=object)
        found, counts = np.unique(names, return_counts=True)
        for name in found[np.argsort(-counts, kind="stable")]:
            rows = names == name
            own, scores = malignant[rows], risks[rows]
            measured: dict[str, float | None] = dict.fromkeys(("auc", "pauc", "sensitivity", "specificity"))
            sensitivity, specificity = sensitivity_specificity(own, scores, threshold)
            enough = own.sum() >= MIN_SUBGROUP, (~own).sum() >= MIN_SUBGROUP
            if enough[0]:
                measured["sensitivity"] = float(sensitivity)
            if enough[1]:
                measured["specificity"] = float(specificity)
            if all(enough):
                measured["auc"] = float(roc_auc(own, scores))
                measured["pauc"] = float(partial_auc_above_tpr(own, scores))
            table.append(
                {"column": column, "value": str(name), "n": len(own), "n_malignant": int(own.sum()), **measured}
            )
    return table


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> list[list[int]]:
    """Counts [true class][predicted class]."""
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).tolist()
