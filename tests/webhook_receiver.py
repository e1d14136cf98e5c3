"""A receiver of webhooks on loopback, which answers as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

WAIT_S = 30


class Received(NamedTuple):
    """One request, headers by lower-case name."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class WebhookReceiver:
    """Answers with the next of `answers`: a status, (status, headers), "close" or "hang"; with 204 after the last."""

    def __init__(self, *answers: Any):
        self.answers = list(answers)
        self.received: list[Received] = []
        self.arrived = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.url = ""

    @property
    def ids(self) -> list[str]:
        return [request.id for request in self.received]

    def wait(self) -> Received:
        """The request that came last, once one more has come."""
        assert self.arrived.acquire(timeout=WAIT_S), "no webhook came"
        return self.received[-1]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.received.append(Received(handler.path, headers, body))
        answer = self.answers.pop(0) if self.answers else 204
        self.arrived.release()
        if answer in ("close", "hang", "trickle"):
            if answer == "trickle":
                while not self.let_go.wait(0.02):
                    handler.wfile.write(b"X")
            if answer == "hang":
                self.let_go.wait(WAIT_S)
            handler.close_connection = True
            return
        status, extra = answer if isinstance(answer, tuple) else (answer, {})
        handler.send_response(status)
        for name, value in {"content-length": "0", **extra}.items():
            handler.send_header(name, value)
        handler.end_headers()


@contextmanager
def webhook_receiver(*answers: Any) -> Iterator[WebhookReceiver]:
    """Listens until the block ends."""
    receiver = WebhookReceiver(*answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                receiver._handle(self)
            except ConnectionError:
                # The sender went away first.
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """No lines on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}/alarms"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.let_go.set()
        server.shutdown()
        server.server_close()
