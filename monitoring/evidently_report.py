"""The Evidently report of a window, HTML, JSON and workspace, with our distances and our thresholds for every column.

Evidently takes 7-12 s to import, so everything of it is imported inside the functions, in jobs only.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from monitoring.drift_statistics import STATISTIC_NAMES, Feature, FeatureDrift, kolmogorov_smirnov
from store.synced_files import replacing

# Ids in the workspace are made from names: the same window is the same snapshot, whoever writes it again.
_NAMESPACE = uuid.UUID("6f1d3c52-6f0e-4a53-9a39-0b9d0b3c6a11")
_MAX_DASHBOARD_COLUMNS = 12


@dataclass(frozen=True)
class WorkspaceEntry:
    """Where a window stands in an Evidently workspace: one project per model and reference, one snapshot per window.

    Attributes:
        folder: of the workspace.
        project: its name.
        window: the snapshot's name; start: the snapshot's time.
    """

    folder: Path
    project: str
    window: str
    start: datetime

    @property
    def project_id(self) -> uuid.UUID:
        return uuid.uuid5(_NAMESPACE, self.project)

    @property
    def snapshot_file(self) -> Path:
        snapshot = uuid.uuid5(self.project_id, self.window)
        return self.folder / str(self.project_id) / "snapshots" / f"{snapshot}.json"


def write_evidently_report(
    features: list[Feature],
    verdicts: list[FeatureDrift],
    html: Path,
    json_path: Path,
    max_rows: int,
    seed: int = 0,
    entry: WorkspaceEntry | None = None,
) -> None:
    """Writes the report of judged features, each with the threshold of its verdict, drifted ones first.

    Evidently's own default, an alarm once half of the columns drift, misses a shift of a few columns: here one is
    enough. A side with more than `max_rows` rows is shown by a seeded sample of them.

    Args:
        entry: where `evidently ui` is to show it; a snapshot that stands there is replaced.
    """
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import DriftedColumnsCount, ValueDrift

    _register_ks_distance()
    kinds = {feature.name: feature.kind for feature in features}
    definition = DataDefinition(
        numerical_columns=[name for name, kind in kinds.items() if kind == "numeric"],
        categorical_columns=[name for name, kind in kinds.items() if kind == "categorical"],
    )
    ordered = sorted((v for v in verdicts if v.name in kinds), key=lambda verdict: not verdict.drifted)
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
    named = {} if entry is None else {"timestamp": entry.start.replace(tzinfo=None), "name": entry.window}
    snapshot = Report([count, *columns], include_tests=True).run(*sides, **named)
    html.parent.mkdir(parents=True, exist_ok=True)
    _replace(json_path, snapshot.save_json)
    _replace(html, snapshot.save_html)
    if entry is not None:
        _write_entry(entry, snapshot, [verdict.name for verdict in verdicts if verdict.name in kinds])


def _write_entry(entry: WorkspaceEntry, snapshot: Any, columns: list[str]) -> None:
    """Writes project, dashboard and snapshot as `evidently.ui.workspace.Workspace` of 0.7.23 lays them out.

    By its file format, because its `add_run` gives every snapshot a random id and writes no file whole or not at all.
    """
    from evidently.legacy.utils import NumpyEncoder
    from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric, ProjectModel
    from evidently.sdk.panels import line_plot_panel
    from evidently.ui.storage.local.base import DASHBOARD_FILE_NAME, PROJECT_FILE_NAME

    project = entry.snapshot_file.parent.parent
    entry.snapshot_file.parent.mkdir(parents=True, exist_ok=True)

    def write(path: Path, content: dict[str, Any]) -> None:
        text = json.dumps(content, cls=NumpyEncoder)
        _replace(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    count = PanelMetric(legend="drifted columns", metric="DriftedColumnsCount", metric_labels={"value_type": "count"})
    distances = [
        PanelMetric(legend=name, metric="ValueDrift", metric_labels={"column": name})
        for name in columns[:_MAX_DASHBOARD_COLUMNS]
    ]
    panels = [
        line_plot_panel("Drifted columns per window", [count]),
        line_plot_panel("Distance from the reference", distances),
    ]
    for panel in panels:
        panel.id = uuid.uuid5(entry.project_id, panel.title)
    tab = DashboardTabModel(id=uuid.uuid5(entry.project_id, "tab"), title="Drift", panels=[p.id for p in panels])
    write(project / PROJECT_FILE_NAME, ProjectModel(id=entry.project_id, name=entry.project).dict())
    write(project / DASHBOARD_FILE_NAME, DashboardModel(tabs=[tab], panels=panels).dict())
    write(entry.snapshot_file, snapshot.to_snapshot_model().dict())


def _table(features: list[Feature], side: str, max_rows: int, seed: int):
    import pandas as pd

    num_rows = len(getattr(features[0], side))
    # Drawn before the table is made: it would hold the window a second time.
    rows = slice(None)
    if num_rows > max_rows:
        rows = np.sort(np.random.default_rng(seed).choice(num_rows, max_rows, replace=False))
    table = {}
    for feature in features:
        values = getattr(feature, side)[rows]
        if feature.kind == "categorical":
            # The last name is what the code -1 of a row without a value points at.
            values = np.array([*feature.categories, None], dtype=object)[values]
        table[feature.name] = values
    return pd.DataFrame(table)


def _register_ks_distance() -> None:
    """Makes our distance known to Evidently, whose own test of this name gives a p-value for independent rows."""
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    def ks_distance(reference, current, feature_type, threshold: float) -> tuple[float, bool]:
        distance = kolmogorov_smirnov(reference.to_numpy(), current.to_numpy())
        return distance, distance >= threshold

    test = StatTest(STATISTIC_NAMES["numeric"], "Kolmogorov-Smirnov distance", [ColumnType.Numerical])
    register_stattest(test, ks_distance)


def _replace(path: Path, save: Callable[[str], object]) -> None:
    """Saves under a temporary name first, so that a cut-off run leaves no half report, and nothing beside it."""
    with replacing(path) as temporary:
        save(str(temporary))
