"""Two models on the same lesions: differences with intervals over resampled patients, and who finds which cancer.

A difference of two models' own intervals says little: both move together with the lesions drawn. Here every resample is
scored by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modeling.clinical_tables import MIN_SUBGROUP
from modeling.metrics import resampled_areas, sensitivity_specificity
from modeling.patient_relative import group_codes, is_missing
from modeling.resampling import clustered_bootstrap

_MEASURES = ("auc", "pauc", "sensitivity", "specificity")


@dataclass(frozen=True)
class ModelRisks:
    """What one model says of N lesions: `risks`, P(malignant) float (N,), and its own operating `threshold`."""

    risks: np.ndarray
    threshold: float


@dataclass(frozen=True)
class Difference:
    """A figure of both models, and candidate minus champion with its 95 % interval; None where undefined."""

    candidate: float | None
    champion: float | None
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SubgroupPair:
    """Both models' sensitivity among the malignant lesions of a subgroup, each at its own operating threshold."""

    column: str
    value: str
    n_malignant: int
    candidate: float
    champion: float


@dataclass(frozen=True)
class PairedComparison:
    """A candidate beside the champion on the same lesions.

    Attributes:
        malignant_groups: patients (groups) with a malignant lesion: what the intervals rest on.
        gained, lost: malignant lesions that only the candidate, and only the champion, finds at its own threshold.
        auc, pauc, sensitivity, specificity: of both; pAUC above 80 % sensitivity, the last two at own thresholds.
        subgroups: those with at least `MIN_SUBGROUP` malignant lesions.
    """

    n: int
    n_malignant: int
    malignant_groups: int
    gained: int
    lost: int
    auc: Difference
    pauc: Difference
    sensitivity: Difference
    specificity: Difference
    subgroups: list[SubgroupPair] = field(default_factory=list)


def compare_models(
    malignant: np.ndarray,
    groups: Sequence,
    candidate: ModelRisks,
    champion: ModelRisks,
    subgroups: Mapping[str, Sequence] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> PairedComparison:
    """Compares two models on N lesions that trained neither.

    Args:
        malignant: bool (N,).
        groups: patient or lesion ids (N,), resampled together.
        subgroups: name -> value of each lesion (N,).
        num_bootstrap: resamples; 0 leaves the intervals None, as do fewer than `modeling.resampling.MIN_GROUPS` groups
            with malignant, or with benign, lesions.
    """
    malignant = np.asarray(malignant, dtype=bool)
    models = (candidate, champion)
    areas = [resampled_areas(malignant, model.risks) for model in models]

    def figures(rows: np.ndarray) -> np.ndarray:
        """(2, 4): both models' measures on these rows."""
        return np.array(
            [
                [*area(rows), *sensitivity_specificity(malignant[rows], model.risks[rows], model.threshold)]
                for area, model in zip(areas, models, strict=True)
            ]
        )

    def differences(rows: np.ndarray) -> np.ndarray:
        new, old = figures(rows)
        return new - old

    point = figures(np.arange(len(malignant)))
    low, high = clustered_bootstrap(differences, groups, num_bootstrap, seed, malignant)
    found = [(model.risks >= model.threshold)[malignant] for model in models]
    return PairedComparison(
        n=len(malignant),
        n_malignant=int(malignant.sum()),
        malignant_groups=len(np.unique(group_codes(groups)[malignant])),
        gained=int((found[0] & ~found[1]).sum()),
        lost=int((~found[0] & found[1]).sum()),
        subgroups=_subgroups(malignant, found, subgroups or {}),
        **{
            name: Difference(*map(_number, (*point[:, i], point[0, i] - point[1, i], low[i], high[i])))
            for i, name in enumerate(_MEASURES)
        },
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _subgroups(
    malignant: np.ndarray, found: Sequence[np.ndarray], columns: Mapping[str, Sequence]
) -> list[SubgroupPair]:
    pairs = []
    for column, values in columns.items():
        names = np.array(["(missing)" if is_missing(value) else str(value) for value in values], dtype=object)
        names = names[malignant]
        for name in sorted(set(names)):
            rows = names == name
            if rows.sum() >= MIN_SUBGROUP:
                shares = [float(hits[rows].mean()) for hits in found]
                pairs.append(SubgroupPair(column, str(name), int(rows.sum()), *shares))
    return pairs
