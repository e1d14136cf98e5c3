"""The service's real routes behind a real HTTP server on loopback, its submissions scored in the background."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from local.one_process import on_loopback
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.settings import SubmissionSettings
from serve.submission_queue import SubmissionQueue
from serve.submission_worker import SubmissionWorker
from store.api_keys import list_api_keys
from tests.bundle_factory import backend
from tests.local_service import LocalService


@contextmanager
def http_server(local: LocalService, require_keys: bool = False) -> Iterator[str]:
    """Serves `local` until the block ends; yields the URL."""
    settings = SubmissionSettings(poll_interval_s=0.05, backoff_s=0.01)
    worker = SubmissionWorker(local.service, local.log, settings)
    queue = SubmissionQueue(local.service, local.log, settings, worker.wake)
    keys = KeyRing(lambda: list_api_keys(local.log.store, live_only=True), 0.05) if require_keys else None
    api = build_api(dataclasses.replace(backend(local.service, local.log), submissions=queue, keys=keys))
    with on_loopback(api, worker) as url:
        yield url
