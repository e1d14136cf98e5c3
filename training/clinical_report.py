"""The part of an evaluation that a dermatologist and a regulator read: operating points, subgroups, net benefit, paired
gains, and which cancers were missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from modeling.clinical_tables import (
    confusion_matrix,
    needed_to_triage,
    net_benefit,
    subgroup_columns,
    subgroup_table,
    top_retrieval,
)
from modeling.conformal import ConformalSets
from modeling.metrics import (
    predicted_classes,
    resampled_areas,
    risk,
    sensitivity_specificity,
)
from modeling.operating_points import Thresholds
from modeling.resampling import clustered_bootstrap
from modeling.schema import TaskSpec


def clinical_report(
    task: TaskSpec,
    lesions: pd.DataFrame,
    probabilities: np.ndarray,
    thresholds: Thresholds,
    sets: ConformalSets,
    num_bootstrap: int,
    seed: int,
    prevalence: float | None = None,
) -> dict[str, Any]:
    """Tables of one model on held-out lesions, JSON-ready; `measured_..._low` and `..._high` are 95 % intervals over
    resampled groups, None where `clustered_bootstrap` has none.

    Args:
        lesions: rows of a dataset version (N,).
        probabilities: calibrated class probabilities float64 (N, K).
        thresholds, sets: of the model, chosen on other rows.
        prevalence: for which net benefit and lesions per cancer are stated; None = that of these lesions.
    """
    labels = lesions["label"].to_numpy(np.int64)
    malignant, risks = task.malignant_mask[labels], risk(probabilities, task)

    def rates(rows: np.ndarray) -> np.ndarray:
        return np.array([sensitivity_specificity(malignant[rows], risks[rows], p.threshold) for p in thresholds.points])

    every = rates(np.arange(len(labels)))
    low, high = clustered_bootstrap(rates, lesions["group"].to_numpy(str), num_bootstrap, seed, malignant)
    points = []
    for index, point in enumerate(thresholds.points):
        measured = {
            f"measured_{name}{end}": values[index, side]
            for side, name in enumerate(("sensitivity", "specificity"))
            for end, values in (("", every), ("_low", low), ("_high", high))
        }
        points.append(
            point.model_dump(include={"sensitivity", "sensitivity_low", "threshold"})
            | {name: None if np.isnan(value) else float(value) for name, value in measured.items()}
            | {"needed_to_triage": needed_to_triage(malignant, risks, point.threshold, prevalence)}
        )
    patients = lesions["context"].to_numpy(str)
    predicted = predicted_classes(probabilities, task, thresholds.threshold)
    return {
        "operating_points": points,
        "net_benefit": net_benefit(malignant, risks, prevalence=prevalence),
        "top_retrieval": top_retrieval(malignant, risks, patients) if task.context_group else None,
        "confusion": confusion_matrix(labels, predicted, task.num_classes),
        "subgroups": subgroup_table(malignant, risks, thresholds.threshold, subgroup_columns(task, lesions)),
        "conformal": sets.coverage(probabilities, labels, task.classes),
    }


def paired_gains(
    malignant: np.ndarray, risks: Mapping[str, np.ndarray], groups: Sequence, num_bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """How much each model gains over each one named before it, on the same lesions and the same resampled groups.

    Args:
        malignant: bool (N,).
        risks: model -> P(malignant) float (N,).
        groups: (N,), resampled together.

    Returns:
        Rows {model, against, auc, pauc}, the last two as {value, low, high}, None where undefined.
    """
    names = list(risks)
    pairs = [(later, earlier) for index, later in enumerate(names) for earlier in names[:index]]
    if not pairs:
        return []

    areas = {name: resampled_areas(malignant, risks[name]) for name in names}

    def gains(rows: np.ndarray) -> np.ndarray:
        auc_and_pauc = {name: np.array(areas[name](rows)) for name in names}
        return np.array([auc_and_pauc[a] - auc_and_pauc[b] for a, b in pairs])

    point = gains(np.arange(len(malignant)))
    low, high = clustered_bootstrap(gains, groups, num_bootstrap, seed, malignant)

    def entry(index: int, measure: int) -> dict[str, float | None]:
        values = {"value": point, "low": low, "high": high}
        return {k: None if np.isnan(v[index, measure]) else float(v[index, measure]) for k, v in values.items()}

    return [
        {"model": a, "against": b, "auc": entry(index, 0), "pauc": entry(index, 1)}
        for index, (a, b) in enumerate(pairs)
    ]


def missed_cancers(task: TaskSpec, lesions: pd.DataFrame, probabilities: np.ndarray, threshold: float) -> pd.DataFrame:
    """Malignant lesions below the threshold, lowest risk first: id, class, risk. For a report that stays in house."""
    labels = lesions["label"].to_numpy(np.int64)
    risks = risk(probabilities, task)
    missed = np.flatnonzero(task.malignant_mask[labels] & (risks < threshold))
    missed = missed[np.argsort(risks[missed], kind="stable")]
    table = {"id": lesions["id"].to_numpy()[missed], "class": np.array(task.classes, dtype=object)[labels[missed]]}
    return pd.DataFrame(table | {"risk": risks[missed]})
