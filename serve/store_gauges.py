"""Figures of the store that no request tells: alarms, their deliveries, drift reports, labels, quality on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from monitoring.prediction_log import PredictionLog
from serve.metrics import (
    ALARM_DELIVERIES,
    ALARMS_UNACKNOWLEDGED,
    DRIFT_ALARM,
    DRIFT_DISTANCE_RATIO,
    DRIFT_EMBEDDING_AUC,
    DRIFT_FEATURES,
    DRIFT_REPORT_AGE_SECONDS,
    LABELS,
    QUALITY,
    Metric,
    Recorder,
)
from store.alarm_deliveries import count_deliveries
from store.alarm_figures import count_labels, newest_reports, open_alarms
from store.database import Store
from store.tables import now_us

# Of these, nothing changes faster than an operator looks; counting labels takes longer the more there are.
_INTERVAL_S = 30.0
# A model that went long ago is no model whose check is overdue.
_NEWEST_DAYS = 30
_DAY_US = 86_400_000_000

_QUALITY_FIGURES, _BOUNDS = ("auc", "pauc", "sensitivity", "specificity"), ("value", "low", "high")

_Values = Mapping[tuple[str, ...], float]


class StoreGauges:
    """Reads the store every thirty seconds at most, however often it is called.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, log: PredictionLog, metrics: Recorder, clock: Callable[[], float] = time.monotonic):
        self._log = log
        self._metrics = metrics
        self._clock = clock
        self._due = clock()
        self._told: dict[str, set[tuple[str, ...]]] = {}

    def read(self) -> None:
        """Tells the figures, if it is time.

        Raises:
            StoreUnavailableError: the database does not answer; what was told stays.
        """
        if self._clock() < self._due:
            return
        self._due = self._clock() + _INTERVAL_S
        store = self._log.store
        self._tell(ALARMS_UNACKNOWLEDGED, open_alarms(store))
        self._tell(ALARM_DELIVERIES, count_deliveries(store))
        self._tell(LABELS, {(str(malignant).lower(),): number for malignant, number in count_labels(store).items()})
        self._tell_drift(store)

    def _tell_drift(self, store: Store) -> None:
        now = now_us()
        reports = {(row["model_version"],): row for row in newest_reports(store, now - _NEWEST_DAYS * _DAY_US)}
        self._tell(DRIFT_REPORT_AGE_SECONDS, {key: (now - row["window_end"]) / 1e6 for key, row in reports.items()})
        self._tell(DRIFT_ALARM, {key: float(row["alarm"]) for key, row in reports.items()})
        self._tell(DRIFT_FEATURES, {key: len(row["drifted"]) for key, row in reports.items()})
        self._tell(DRIFT_DISTANCE_RATIO, _given({key: _largest_ratio(row) for key, row in reports.items()}))
        self._tell(DRIFT_EMBEDDING_AUC, _given({key: _embedding_auc(row) for key, row in reports.items()}))
        quality = {key + of: value for key, row in reports.items() for of, value in _quality(row).items()}
        self._tell(QUALITY, _given(quality))

    def _tell(self, metric: Metric, values: _Values) -> None:
        """These, and no longer those that were told and are not among them."""
        for labels in self._told.get(metric.name, set()) - set(values):
            self._metrics.forget(metric, *labels)
        for labels, value in values.items():
            self._metrics.record(metric, value, *labels)
        self._told[metric.name] = set(values)


def _given(values: Mapping[tuple[str, ...], float | None]) -> _Values:
    return {key: value for key, value in values.items() if value is not None}


def _largest_ratio(row: Mapping[str, Any]) -> float | None:
    """Of the features' distances to their thresholds; None for a window that was too small to judge."""
    features = row["statistics"].get("features") or []
    return max((item["distance"] / item["threshold"] for item in features if item["threshold"] > 0), default=None)


def _embedding_auc(row: Mapping[str, Any]) -> float | None:
    embedding = row["statistics"].get("embedding")
    return None if embedding is None else embedding["auc"]


def _quality(row: Mapping[str, Any]) -> dict[tuple[str, ...], float | None]:
    """By (context, figure, estimate, bound); empty where quality was not measured."""
    contexts = row["statistics"].get("quality", {}).get("trailing", {}).get("contexts", {})
    return {
        (context, figure, estimate, bound): (figures.get(figure) or {}).get(bound)
        for context, plain in contexts.items()
        for estimate, figures in (("plain", plain), ("corrected", plain.get("corrected")))
        if figures is not None
        for figure in _QUALITY_FIGURES
        for bound in _BOUNDS
    }
