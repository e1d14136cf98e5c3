"""The figures of an ingress replica that are read every few seconds, not told."""

from __future__ import annotations

from monitoring.prediction_log import PredictionLog
from serve.admission import Admission
from serve.durable_log import DurableLog
from serve.metrics import (
    ADMISSION_INSIDE,
    ADMISSION_REFUSALS,
    ADMISSION_WAITING,
    LOG_SPOOL_PENDING,
    LOG_SPOOLING,
    Recorder,
)
from serve.sampling import Sampler


def watch_admission(sampler: Sampler, metrics: Recorder, admission: Admission) -> None:
    """Who is inside, who waits, and how many were refused since."""
    refused = 0

    def read() -> None:
        nonlocal refused
        metrics.record(ADMISSION_INSIDE, admission.num_requests)
        metrics.record(ADMISSION_WAITING, admission.num_waiting)
        new, refused = admission.num_refused - refused, admission.num_refused
        metrics.record(ADMISSION_REFUSALS, new)

    sampler.add(read)


def watch_log(sampler: Sampler, metrics: Recorder, durable: DurableLog, log: PredictionLog) -> None:
    """Whether records go to the spool, and what is in it."""
    sampler.add(lambda: metrics.record(LOG_SPOOLING, int(durable.spooling)))
    sampler.add(lambda: metrics.record(LOG_SPOOL_PENDING, log.spool.pending()), blocking=True)
