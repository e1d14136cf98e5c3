"""The Evidently report of a window, HTML and JSON, with our distances and our thresholds for every column.

Evidently takes 7-12 s to import, so everything of it is imported inside the functions, in jobs only.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from monitoring.drift_statistics import STATISTIC_NAMES, Feature, FeatureDrift, kolmogorov_smirnov


def write_evidently_report(
    features: list[Feature], verdicts: list[FeatureDrift], html: Path, json: Path, max_rows: int, seed: int = 0
) -> None:
    """Writes the report of judged features, each with the threshold of its verdict, drifted ones first.

    Evidently's own default, an alarm once half of the columns drift, misses a shift of a few columns: here one is
    enough. A side with more than `max_rows` rows is shown by a seeded sample of them.
    """
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import DriftedColumnsCount, ValueDrift

    _register_ks_distance()
    kinds = {feature.name: feature.kind for feature in features}
    definition = DataDefinition(
        numerical_columns=[name for name, kind in kinds.items() if kind == "numeric"],
        categorical_columns=[name for name, kind in kinds.items() if kind == "categorical"],
    )
    ordered = sorted(verdicts, key=lambda verdict: not verdict.drifted)
    count = DriftedColumnsCount(
        columns=[verdict.name for verdict in ordered],
        num_method=STATISTIC_NAMES["numeric"],
        cat_method=STATISTIC_NAMES["categorical"],
        per_column_threshold={verdict.name: verdict.threshold for verdict in ordered},
        drift_share=0.5 / len(ordered),
    )
    columns = [ValueDrift(column=v.name, method=v.statistic, threshold=v.threshold) for v in ordered]
    sides = [
        Dataset.from_pandas(_table(features, side, max_rows, seed), data_definition=definition)
        for side in ("current", "reference")
    ]
    snapshot = Report([count, *columns], include_tests=True).run(*sides)
    html.parent.mkdir(parents=True, exist_ok=True)
    _replace(json, snapshot.save_json)
    _replace(html, snapshot.save_html)


def _table(features: list[Feature], side: str, max_rows: int, seed: int):
    import pandas as pd

    table = pd.DataFrame({feature.name: getattr(feature, side) for feature in features})
    if len(table) <= max_rows:
        return table
    rows = np.sort(np.random.default_rng(seed).choice(len(table), max_rows, replace=False))
    return table.iloc[rows].reset_index(drop=True)


def _register_ks_distance() -> None:
    """Makes our distance known to Evidently, whose own test of this name gives a p-value for independent rows."""
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    def ks_distance(reference, current, feature_type, threshold: float) -> tuple[float, bool]:
        distance = kolmogorov_smirnov(reference.to_numpy(dtype=float), current.to_numpy(dtype=float))
        return distance, distance >= threshold

    test = StatTest(STATISTIC_NAMES["numeric"], "Kolmogorov-Smirnov distance", [ColumnType.Numerical])
    register_stattest(test, ks_distance)


def _replace(path: Path, save: Callable[[str], object]) -> None:
    """Saves under a temporary name first, so that a cut-off run leaves no half report."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        save(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
