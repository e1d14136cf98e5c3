"""Every figure of the service that Prometheus can scrape from Ray, in one table, and how it is recorded.

The nodes' logic gets a `Recorder`; in a replica it is `RayMetrics`. Ray exports what is here with the prefix `ray_`,
and counters with the suffix `_total`; docs/observability.md explains each.

Figures add up in the replica and are told to Ray every few seconds. Ray's own histograms, six values a request, would
cost more than all else here: 2.5 us a value in the replica and 10 us in the node's agent, which replays them one by one
and exports sums of the middles of buckets. A gauge that is not told again is gone after two export intervals.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from dataclasses import dataclass
from typing import Literal, Protocol

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


@dataclass(frozen=True, eq=False)
class Metric:
    """One figure.

    Attributes:
        labels: their values are few: routes, stages, reasons, error codes, versions; never what a client sent.
        buckets: upper bounds of a histogram's.
        per_replica: whether it also has the label `replica`, as every histogram has: Serve's name for what Ray
            labels with the id of a worker process.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    per_replica: bool = False

    @property
    def has_replica(self) -> bool:
        """Whether there is one of each replica: not of counters, whose increments Ray adds up."""
        return self.per_replica or self.kind == "histogram"

    @property
    def tag_keys(self) -> tuple[str, ...]:
        """All labels as exported, but for a bucket's `le`."""
        return (*self.labels, "replica") if self.has_replica else self.labels

    @property
    def exported_name(self) -> str:
        """As Prometheus sees it; a histogram has `_bucket`, `_count` and `_sum` of it."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


STAGE_SECONDS = Metric(
    "dermray_stage_seconds",
    "histogram",
    "Time of a request in a stage: lookup, decode, score, fuse, log; total is all of it.",
    ("route", "stage"),
    _SECONDS,
)
PREDICTIONS = Metric(
    "dermray_predictions",
    "counter",
    "Lesions answered and logged, by band of risk; band abstained: answered without a risk.",
    ("route", "band", "model_version"),
)
ABSTENTIONS = Metric(
    "dermray_abstentions",
    "counter",
    "Reasons for which the model gave no risk; a lesion may have several.",
    ("reason", "model_version"),
)
PROBLEMS = Metric(
    "dermray_problems",
    "counter",
    "Requests answered with a 4xx or 5xx, by the error code of the answer.",
    ("route", "status", "error"),
)
ADMISSION_REFUSALS = Metric(
    "dermray_admission_refusals", "counter", "Requests refused at the door because the service was full (503)."
)
ADMISSION_INSIDE = Metric(
    "dermray_admission_inside", "gauge", "Requests that need the network and have been let in.", per_replica=True
)
ADMISSION_WAITING = Metric(
    "dermray_admission_waiting",
    "gauge",
    "Requests outside, waiting for a place or for their refusal.",
    per_replica=True,
)
SCORER_PICTURES = Metric(
    "dermray_scorer_pictures", "histogram", "Pictures that the network scored in one run.", (), _COUNTS
)
SCORER_BUSY_SECONDS = Metric(
    "dermray_scorer_busy_seconds", "counter", "Time that the network was running.", per_replica=True
)
LOG_COMMIT_SECONDS = Metric(
    "dermray_log_commit_seconds",
    "histogram",
    "Time to put pictures and rows of one commit on disk; outcome: ok, or error.",
    ("outcome",),
    _SECONDS,
)
LOG_COMMIT_ROWS = Metric("dermray_log_commit_rows", "histogram", "Predictions in one commit.", (), _COUNTS)
LOG_SPOOLING = Metric(
    "dermray_log_spooling",
    "gauge",
    "1 while an ingress replica writes to its local spool because the drift logger does not answer, else 0.",
    per_replica=True,
)
LOG_SPOOL_PENDING = Metric(
    "dermray_log_spool_pending",
    "gauge",
    "Batches of predictions in the spool of a replica's node.",
    per_replica=True,
)
SUBMISSIONS_PENDING = Metric(
    "dermray_submissions_pending", "gauge", "Submissions in the store that are not settled.", ("state",)
)
ALARMS_UNACKNOWLEDGED = Metric(
    "dermray_alarms_unacknowledged",
    "gauge",
    "Alarms that no one has acknowledged, without those that an earlier one quiets.",
    ("kind", "severity"),
)
ALARM_DELIVERIES = Metric(
    "dermray_alarm_deliveries",
    "gauge",
    "Alarms that a channel has not taken: pending, to be tried again, or failed, given up.",
    ("channel", "state"),
)
LABELS = Metric("dermray_labels", "gauge", "Experts' labels in the store; malignant: true or false.", ("malignant",))
DRIFT_REPORT_AGE_SECONDS = Metric(
    "dermray_drift_report_age_seconds",
    "gauge",
    "Time since the end of the newest window that was checked for drift.",
    ("model_version",),
)
DRIFT_ALARM = Metric("dermray_drift_alarm", "gauge", "1 if that window drifted, else 0.", ("model_version",))
DRIFT_FEATURES = Metric("dermray_drift_features", "gauge", "What drifted in that window.", ("model_version",))
DRIFT_DISTANCE_RATIO = Metric(
    "dermray_drift_distance_ratio",
    "gauge",
    "Largest distance of a feature in that window, as a part of its threshold; 1 is drift.",
    ("model_version",),
)
DRIFT_EMBEDDING_AUC = Metric(
    "dermray_drift_embedding_auc",
    "gauge",
    "How well that window's embeddings are told from the reference's; 0.5: not at all.",
    ("model_version",),
)
QUALITY = Metric(
    "dermray_quality",
    "gauge",
    "A figure on the experts' labels of the trailing days of that window, and its 95 % interval: value, low, high.",
    ("model_version", "context", "figure", "estimate", "bound"),
)
MODEL_INFO = Metric(
    "dermray_model_info",
    "gauge",
    "1 for the model that a replica holds, 0 for one that it held before.",
    ("deployment", "model_version", "digest"),
    per_replica=True,
)

METRICS: tuple[Metric, ...] = (
    STAGE_SECONDS,
    PREDICTIONS,
    ABSTENTIONS,
    PROBLEMS,
    ADMISSION_REFUSALS,
    ADMISSION_INSIDE,
    ADMISSION_WAITING,
    SCORER_PICTURES,
    SCORER_BUSY_SECONDS,
    LOG_COMMIT_SECONDS,
    LOG_COMMIT_ROWS,
    LOG_SPOOLING,
    LOG_SPOOL_PENDING,
    SUBMISSIONS_PENDING,
    ALARMS_UNACKNOWLEDGED,
    ALARM_DELIVERIES,
    LABELS,
    DRIFT_REPORT_AGE_SECONDS,
    DRIFT_ALARM,
    DRIFT_FEATURES,
    DRIFT_DISTANCE_RATIO,
    DRIFT_EMBEDDING_AUC,
    QUALITY,
    MODEL_INFO,
)


class Recorder(Protocol):
    """Where figures go."""

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        """Adds to a counter, sets a gauge, or puts a value into a histogram; from any thread.

        Args:
            labels: the values of `metric.labels`, in order.
        """
        ...

    def forget(self, metric: Metric, *labels: str) -> None:
        """A gauge of these labels is not told any more, and so gone after two of Ray's intervals."""
        ...

    def flush(self) -> None:
        """Passes on what was recorded; to be called every few seconds."""
        ...


class NoMetrics:
    """Records nothing."""

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        pass

    def forget(self, metric: Metric, *labels: str) -> None:
        pass

    def flush(self) -> None:
        pass


_Series = tuple[Metric, tuple[str, ...]]


class RayMetrics:
    """Records for Ray, which every node's agent exports; made when a replica starts.

    A histogram is told as gauges `_bucket`, `_sum` and `_count` that only grow, which is what Prometheus computes with.

    Args:
        replica: the label of figures that each replica has its own of.
    """

    def __init__(self, replica: str):
        from ray.util import metrics

        self._replica = replica
        self._lock = threading.Lock()
        self._counters: dict[_Series, float] = {}
        self._gauges: dict[_Series, float] = {}
        self._histograms: dict[_Series, tuple[list[int], list[float]]] = {}
        self._instruments: dict[str, metrics.Counter | metrics.Gauge] = {}
        for metric in METRICS:
            name, text, keys = metric.name, metric.description, metric.tag_keys
            if metric.kind == "counter":
                self._instruments[name] = metrics.Counter(name, text, keys)
            elif metric.kind == "gauge":
                self._instruments[name] = metrics.Gauge(name, text, keys)
            else:
                self._instruments[f"{name}_bucket"] = metrics.Gauge(f"{name}_bucket", text, (*keys, "le"))
                for part in ("sum", "count"):
                    self._instruments[f"{name}_{part}"] = metrics.Gauge(f"{name}_{part}", text, keys)

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        assert len(labels) == len(metric.labels), (metric.name, labels)
        series = metric, labels
        with self._lock:
            if metric.kind == "counter":
                self._counters[series] = self._counters.get(series, 0.0) + value
            elif metric.kind == "gauge":
                self._gauges[series] = value
            else:
                if series not in self._histograms:
                    self._histograms[series] = [0] * (len(metric.buckets) + 1), [0.0]
                counts, total = self._histograms[series]
                counts[bisect.bisect_left(metric.buckets, value)] += 1
                total[0] += value

    def forget(self, metric: Metric, *labels: str) -> None:
        with self._lock:
            self._gauges.pop((metric, labels), None)

    def flush(self) -> None:
        with self._lock:
            counters, self._counters = self._counters, {}
            gauges = dict(self._gauges)
            histograms = {series: (list(counts), total[0]) for series, (counts, total) in self._histograms.items()}
        for (metric, labels), value in counters.items():
            if value > 0:  # Ray takes no other
                self._instruments[metric.name].inc(value, self._tags(metric, labels))
        for (metric, labels), value in gauges.items():
            self._instruments[metric.name].set(value, self._tags(metric, labels))
        for (metric, labels), (counts, total) in histograms.items():
            tags = self._tags(metric, labels)
            bounds = (*map("{:g}".format, metric.buckets), "+Inf")
            for bound, number in zip(bounds, itertools.accumulate(counts), strict=True):
                self._instruments[f"{metric.name}_bucket"].set(number, {**tags, "le": bound})
            self._instruments[f"{metric.name}_sum"].set(total, tags)
            self._instruments[f"{metric.name}_count"].set(sum(counts), tags)

    def _tags(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(metric.tag_keys, (*labels, self._replica) if metric.has_replica else labels, strict=True))


def replica_metrics() -> Recorder:
    """Those of the Serve replica that this process is; none where it is no replica."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return RayMetrics(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return NoMetrics()


class ModelInfo:
    """Says which model a replica holds.

    Args:
        deployment: the node's name.
    """

    def __init__(self, metrics: Recorder, deployment: str):
        self._metrics = metrics
        self._deployment = deployment
        self._labels: tuple[str, ...] | None = None

    def holds(self, version: str, digest: str) -> None:
        """This model from now on."""
        labels = (self._deployment, version, digest[:12])
        if self._labels not in (None, labels):
            self._metrics.record(MODEL_INFO, 0, *self._labels)
        self._metrics.record(MODEL_INFO, 1, *labels)
        self._labels = labels
