"""What stands behind the routes."""

from __future__ import annotations

from dataclasses import dataclass, field

from monitoring.prediction_log import PredictionLog
from serve.key_ring import KeyRing
from serve.metrics import NoMetrics, Recorder
from serve.prediction_service import PredictionService
from serve.rate_limit import TokenBuckets
from serve.recent_problems import RecentProblems
from serve.records import RecordService
from serve.sampling import Sampler
from serve.sessions import Sessions
from serve.settings import LinkSettings
from serve.submission_queue import SubmissionQueue


@dataclass(frozen=True)
class Backend:
    """What stands behind the routes.

    Attributes:
        service: scores; it must have a model before the first request.
        log: the prediction log, with its store.
        records: what people read and note in it.
        submissions: what is scored later.
        sessions: of the web pages.
        keys: who may call; None leaves the service open.
        buckets: rate limit per key.
        metrics: what is told of every request.
        sampler: what reads the gauges of the routes.
        problems: what this replica refused or failed to answer.
        links: pages of other tools.
        answers_ids: whether to answer with the request's id; not where the server around the routes does.
    """

    service: PredictionService
    log: PredictionLog
    records: RecordService
    submissions: SubmissionQueue
    sessions: Sessions
    keys: KeyRing | None = None
    buckets: TokenBuckets | None = None
    metrics: Recorder = field(default_factory=NoMetrics)
    sampler: Sampler = field(default_factory=lambda: Sampler(NoMetrics()))
    problems: RecentProblems = field(default_factory=RecentProblems)
    links: LinkSettings = field(default_factory=LinkSettings)
    answers_ids: bool = True
