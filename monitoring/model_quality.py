"""How good the model is on the answers that experts have labelled by now, against what it was on its gate split.

Labels are not a random sample: lesions that look dangerous are biopsied, others are rarely looked at again. The figures
of the labelled answers alone see too few missed cancers. The corrected ones let each labelled answer stand for all of
its context and band (Begg & Greenes, Biometrics 1983), which is right where, within a band, it is chance who is
labelled; they are None while a band with answers has next to no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.bundle import Bundle
from modeling.clinical_tables import subgroup_columns, subgroup_table
from modeling.metrics import adaptive_ece, calibration_slope_intercept, resampled_areas
from modeling.resampling import clustered_bootstrap
from modeling.schema import TaskSpec
from monitoring.labelled_answers import LabelledAnswers, Stratum, read_labelled_answers
from store.database import Store

if TYPE_CHECKING:
    import pandas as pd

    from monitoring.drift_check import Window

_DAY_US = 86_400_000_000


class QualitySettings(BaseModel):
    """How quality is measured, and when it raises an alarm.

    Attributes:
        trailing_days: labels are few and come late: quality is measured on so many days that end with the window.
        min_malignant: with fewer cancers no figure raises an alarm.
        min_verified: labels that a context's band needs before its answers are stood for by them.
        max_sensitivity_drop: how far below the gate split's the sensitivity may be, as far as its interval tells.
        num_bootstrap: resamples of patients behind intervals of AUC and pAUC.
    """

    model_config = ConfigDict(extra="forbid")

    trailing_days: int = Field(30, ge=1, le=366)
    min_malignant: int = Field(10, ge=2)
    min_verified: int = Field(10, ge=1)
    max_sensitivity_drop: float = Field(0.05, ge=0.0, le=1.0)
    num_bootstrap: int = Field(500, ge=50, le=100_000)
    seed: int = 0


def model_quality(answers: LabelledAnswers, task: TaskSpec, settings: QualitySettings) -> dict[str, Any]:
    """Figures of one model on one window, JSON-ready; what cannot be measured is None.

    Keys: `answers`, `abstentions`, `labelled` (of which it is known whether they are malignant), `malignant`, `readers`
    (labelled answers by `Truth.state`), `abstained_malignant` (cancers that were left to a person), `delay_days`
    (median and p90 from answer to first label) and `contexts`, by context: see `_context_quality`.
    """
    rows = answers.rows
    malignant = rows["malignant"].to_numpy(bool) if len(rows) else np.zeros(0, bool)
    abstained = rows["abstained"].to_numpy(bool) if len(rows) else np.zeros(0, bool)
    delays = rows["delay_us"].to_numpy(float) / _DAY_US if len(rows) else np.zeros(0)
    median, p90 = np.quantile(delays, [0.5, 0.9]) if len(delays) else (None, None)
    contexts = {}
    for context in sorted({context for context, _ in answers.answers}):
        chosen = (rows["context"] == context).to_numpy() & ~abstained if len(rows) else abstained
        counts = {stratum: count for stratum, count in answers.answers.items() if stratum[0] == context}
        contexts[context] = _context_quality(rows[chosen], counts, task, settings)
    return {
        "answers": sum(answers.answers.values()) + answers.abstentions,
        "abstentions": answers.abstentions,
        "labelled": len(rows),
        "malignant": int(malignant.sum()),
        "readers": answers.states,
        "abstained_malignant": int((malignant & abstained).sum()),
        "delay_days": {"median": _number(median), "p90": _number(p90)},
        "contexts": contexts,
    }


def window_quality(
    store: Store, bundle: Bundle, model_version: str | None, window: Window, settings: QualitySettings
) -> dict[str, Any]:
    """Quality on the labels of a window's answers, and on those of the days up to its end.

    Returns:
        `window` and `trailing`, see `model_quality`; `trailing_days`; `problems`, see `quality_problems`, of the
        trailing days.
    """
    begin = min(window.start_us, window.end_us - settings.trailing_days * _DAY_US)
    of_window, of_days = (
        model_quality(read_labelled_answers(store, start, window.end_us, model_version), bundle.task, settings)
        for start in (window.start_us, begin)
    )
    problems = quality_problems(of_days, bundle, settings)
    days = settings.trailing_days
    return {"window": of_window, "trailing": of_days, "trailing_days": days, "problems": problems}


def _context_quality(
    rows: pd.DataFrame, counts: Mapping[Stratum, int], task: TaskSpec, settings: QualitySettings
) -> dict[str, Any]:
    """Figures of one context: `n`, `n_malignant`, `missed` (malignant below the threshold), `share_labelled`; `auc`,
    `pauc`, `sensitivity`, `specificity` as {value, low, high}, plain and under `corrected`; `calibration`
    {slope, intercept, ece}; `subgroups` (see `subgroup_table`); `not_corrected`, why there are no corrected figures.

    Intervals of the areas resample patients and need ten of them with and ten without a cancer; those of the rates are
    Clopper and Pearson's for as many independent lesions as there are patients.
    """
    malignant, risks = rows["malignant"].to_numpy(bool), rows["risk"].to_numpy(float)
    flagged = risks >= rows["threshold"].to_numpy(float)
    groups = rows["group"].to_numpy(str)
    weights, reason = _verification_weights(rows, counts, settings.min_verified)
    rates = {"sensitivity": (malignant, flagged), "specificity": (~malignant, ~flagged)}
    areas = _areas(malignant, risks, groups, None, settings)
    corrected = None
    if weights is not None:
        corrected = _areas(malignant, risks, groups, weights, settings)
        for name, (of, right) in rates.items():
            corrected[name] = _weighted_rate(of, right, weights, groups, malignant, settings)
    slope, intercept = calibration_slope_intercept(malignant, risks)
    calibration = {"slope": slope, "intercept": intercept, "ece": adaptive_ece(malignant, risks)}
    total = sum(counts.values())
    return {
        "n": len(rows),
        "n_malignant": int(malignant.sum()),
        "missed": int((malignant & ~flagged).sum()),
        "share_labelled": len(rows) / total if total else None,
        **areas,
        **{name: _rate(of, right, groups) for name, (of, right) in rates.items()},
        "corrected": corrected,
        "not_corrected": reason,
        "calibration": {name: _number(value) for name, value in calibration.items()},
        # One threshold per context: as distances from it, the risks of all rows share the threshold 0.
        "subgroups": subgroup_table(malignant, risks - rows["threshold"].to_numpy(float), 0.0, _subgroups(task, rows)),
    }


def _subgroups(task: TaskSpec, rows: pd.DataFrame) -> dict[str, Any]:
    missing = np.full(len(rows), None, dtype=object)
    columns: dict[str, Any] = {name: rows.get(f"meta.{name}", missing) for name in task.columns}
    for name in task.numeric_columns:
        columns[name] = np.array([np.nan if value is None else value for value in columns[name]], dtype=float)
    institutions = rows["institution"].to_numpy(object)
    # What the requests named is a column of its own, whatever the training data called it.
    columns |= {name: missing for name in task.subgroup_columns if name not in columns}
    if task.institution_column is not None:
        columns[task.institution_column] = institutions
    named = {
        name: values for name, values in subgroup_columns(task, columns).items() if name != task.institution_column
    }
    return {**named, "institution": institutions, "device": rows["device"].to_numpy(object)}


def _verification_weights(
    rows: pd.DataFrame, counts: Mapping[Stratum, int], min_verified: int
) -> tuple[np.ndarray | None, str | None]:
    """How many answers each labelled one stands for, float64 (N,); or None, and why."""
    bands = rows["band"].to_numpy(str)
    weights = np.ones(len(rows))
    for (_, band), total in sorted(counts.items()):
        own = bands == band
        if own.sum() < min(min_verified, total):
            return None, f"{int(own.sum())} of {total} answers of band {band} are labelled; expected {min_verified}"
        weights[own] = total / own.sum()
    return weights, None


def _areas(
    malignant: np.ndarray, risks: np.ndarray, groups: np.ndarray, weights: np.ndarray | None, settings: QualitySettings
) -> dict[str, Any]:
    areas = resampled_areas(malignant, risks, weights)
    bounds = _bounds(lambda rows: np.array(areas(rows)), groups, malignant, settings)
    return {
        name: _interval(value, low, high)
        for name, value, low, high in zip(("auc", "pauc"), areas(np.arange(len(risks))), *bounds, strict=True)
    }


def _weighted_rate(
    of: np.ndarray,
    right: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray,
    malignant: np.ndarray,
    settings: QualitySettings,
) -> dict[str, Any]:
    def rate(rows: np.ndarray) -> float:
        own = rows[of[rows]]
        return float(np.average(right[own], weights=weights[own])) if len(own) else float("nan")

    return _interval(rate(np.arange(len(of))), *_bounds(rate, groups, malignant, settings))


def _bounds(
    statistic: Callable[[np.ndarray], Any], groups: np.ndarray, malignant: np.ndarray, settings: QualitySettings
) -> tuple[Any, Any]:
    return clustered_bootstrap(statistic, groups, settings.num_bootstrap, settings.seed, malignant)


def _rate(of: np.ndarray, right: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Share of right answers among the lesions `of` (bool (N,)) with its exact 95 % interval (Clopper & Pearson 1934);
    lesions of one patient are not independent, so the count is of patients."""
    from scipy.stats import beta

    if not of.any():
        return _interval(float("nan"), float("nan"), float("nan"))
    share, independent = float(right[of].mean()), len(np.unique(groups[of]))
    hits = share * independent
    low = float(beta.ppf(0.025, hits, independent - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(0.975, hits + 1, independent - hits)) if hits < independent else 1.0
    return _interval(share, low, high)


def quality_problems(quality: Mapping[str, Any], bundle: Bundle, settings: QualitySettings) -> list[str]:
    """What has become worse than on the bundle's gate split by more than chance explains, a line each.

    Sensitivity counts as it is and corrected: that suspicious lesions are labelled makes it look better, never worse.
    AUC counts corrected only, since it then looks worse.
    """
    problems = []
    for context, figures in quality["contexts"].items():
        if figures["n_malignant"] < settings.min_malignant or context not in bundle.manifest.contexts:
            continue
        gate, corrected = bundle.metrics(context)["gate"], figures["corrected"] or {}
        expected = gate.get("sensitivity")
        if expected is not None:
            limit = expected - settings.max_sensitivity_drop
            for found in (figures["sensitivity"], corrected.get("sensitivity")):
                if _below(found, limit):
                    problems.append(f"sensitivity ({context}) {_shown(found)}, {expected:.3f} on the gate split")
                    break
        low = (gate.get("auc") or {}).get("low")
        if low is not None and _below(corrected.get("auc"), low):
            problems.append(f"AUC ({context}) {_shown(corrected['auc'])}, at least {low:.3f} on the gate split")
    return problems


def _below(found: Mapping[str, float | None] | None, limit: float) -> bool:
    return found is not None and found["high"] is not None and found["high"] < limit


def _shown(found: Mapping[str, float | None]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def _interval(value: float, low: float, high: float) -> dict[str, float | None]:
    return {"value": _number(value), "low": _number(low), "high": _number(high)}


def _number(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
