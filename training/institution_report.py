"""How a model fares at an institution that it has not seen: leave-one-institution-out.

Patients, cameras and who gets photographed differ by institution, and folds over patients do not show what that costs:
every fold holds lesions of all institutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modeling.clinical_tables import MIN_SUBGROUP
from modeling.metrics import resampled_areas
from modeling.patient_relative import is_missing
from modeling.resampling import clustered_bootstrap

# Fits on the rows of the first mask (bool (N,)) and gives P(malignant) float (M,) of the second's M rows.
FitPredict = Callable[[np.ndarray, np.ndarray], np.ndarray]


def institution_names(values: Sequence) -> np.ndarray:
    """Names (N,), "(missing)" where there is none."""
    return np.array(["(missing)" if is_missing(value) else str(value) for value in values], dtype=object)


def judged_institutions(institutions: np.ndarray, malignant: np.ndarray, folds: np.ndarray) -> list[str]:
    """Institutions with at least 10 malignant and 10 benign lesions, here and at the others together, where the others'
    lie in at least two folds (int (N,)), which a model needs; by name."""

    def enough(rows: np.ndarray) -> bool:
        return min(malignant[rows].sum(), (~malignant[rows]).sum()) >= MIN_SUBGROUP

    def judged(rows: np.ndarray) -> bool:
        return enough(rows) and enough(~rows) and len(np.unique(folds[~rows])) > 1

    names = [name for name in np.unique(institutions) if name != "(missing)"]
    return [str(name) for name in names if judged(institutions == name)]


def leave_one_institution_out(
    institutions: np.ndarray,
    malignant: np.ndarray,
    seen: np.ndarray,
    groups: np.ndarray,
    folds: np.ndarray,
    fit_predict: FitPredict,
    num_bootstrap: int,
    seed: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per judged institution, JSON-ready.

    Args:
        institutions: names (N,).
        malignant: bool (N,).
        seen: out-of-fold P(malignant) float (N,) of models that saw other patients of every institution.
        groups: (N,), resampled together.
        folds: int (N,).

    Returns:
        Rows {institution, n, n_malignant, seen, unseen, difference}; the last three hold auc and pauc, `difference`
        (unseen - seen) as {value, low, high} over resampled groups of the institution.
    """
    table = []
    for name in judged_institutions(institutions, malignant, folds):
        rows = institutions == name
        say(f"leaving out {name}: {rows.sum()} lesions, {malignant[rows].sum()} malignant")
        unseen = fit_predict(~rows, rows)
        areas = [resampled_areas(malignant[rows], scores) for scores in (unseen, seen[rows])]

        def difference(sample: np.ndarray, areas: list[Callable] = areas) -> np.ndarray:
            return np.subtract(areas[0](sample), areas[1](sample))

        every = np.arange(int(rows.sum()))
        low, high = clustered_bootstrap(difference, groups[rows], num_bootstrap, seed, malignant[rows])
        bounds = {"value": difference(every), "low": low, "high": high}
        named = {
            label: dict(zip(("auc", "pauc"), map(float, area(every)), strict=True))
            for label, area in zip(("unseen", "seen"), areas, strict=True)
        }
        table.append(
            {"institution": name, "n": len(every), "n_malignant": int(malignant[rows].sum())}
            | named
            | {
                "difference": {
                    measure: {key: None if np.isnan(value[i]) else float(value[i]) for key, value in bounds.items()}
                    for i, measure in enumerate(("auc", "pauc"))
                }
            }
        )
    return table
