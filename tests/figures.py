"""A recorder that remembers."""

from __future__ import annotations

from collections import defaultdict

from serve.metrics import Metric


class Figures:
    """`Recorder`: what was told, by metric and labels, in order."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
        self.flushed = 0

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        assert len(labels) == len(metric.labels), (metric.name, labels)
        assert all(isinstance(label, str) for label in labels), labels
        self._values[metric.name, labels].append(value)

    def forget(self, metric: Metric, *labels: str) -> None:
        assert metric.kind == "gauge"
        self._values.pop((metric.name, labels), None)

    def flush(self) -> None:
        self.flushed += 1

    def values(self, metric: Metric, *labels: str) -> list[float]:
        return self._values.get((metric.name, labels), [])

    def labels(self, metric: Metric) -> set[tuple[str, ...]]:
        return {labels for name, labels in self._values if name == metric.name}
