"""The service's real routes behind a real HTTP server on loopback, its submissions scored in the background."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.settings import SubmissionSettings
from serve.submission_queue import SubmissionQueue
from serve.submission_worker import SubmissionWorker
from store.api_keys import list_api_keys
from tests.bundle_factory import backend
from tests.local_service import LocalService

START_S = 60


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextmanager
def http_server(local: LocalService, require_keys: bool = False) -> Iterator[str]:
    """Serves `local` until the block ends; yields the URL."""
    settings = SubmissionSettings(poll_interval_s=0.05, backoff_s=0.01)
    worker = SubmissionWorker(local.service, local.log, settings)
    queue = SubmissionQueue(local.service, local.log, settings, worker.wake)
    keys = KeyRing(lambda: list_api_keys(local.log.store, live_only=True), 0.05) if require_keys else None
    api = build_api(dataclasses.replace(backend(local.service, local.log), submissions=queue, keys=keys))
    server = _Server(uvicorn.Config(api, lifespan="off", log_level="warning"))

    async def serve(listener: socket.socket) -> None:
        worker.start()
        try:
            await server.serve([listener])
        finally:
            await worker.stop()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)), daemon=True)
        thread.start()
        try:
            assert server.listening.wait(START_S), "the server did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_S)
