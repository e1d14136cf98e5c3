"""What stands around the routes, in its order: what is counted, said, asked and bounded before one is reached."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from serve.access import AccessGuard
from serve.admission import Admission, AdmissionGuard
from serve.api_docs import DOCS_PATH, DOCS_POLICY
from serve.arrival import ArrivalTime
from serve.backend import Backend
from serve.front_door import Door
from serve.gauges import watch_admission
from serve.http_errors import Unforeseen
from serve.label_exchange import MAX_EXPORT_BYTES
from serve.label_studio_page import LABELS_PATH
from serve.middleware import BodyLimit, NoticeHeader
from serve.page_access import PageGuard
from serve.page_problems import PageProblems
from serve.problem_counter import ProblemCounter
from serve.read_deadline import ReadDeadline
from serve.replays import Replays
from serve.security_headers import SecurityHeaders
from serve.waiting_bodies import WaitingBodies

NOTICE_HEADER = "X-Dermray-Notice"
# Room for boundaries, field names and the text fields beside the image.
_FORM_BYTES = 2**20 + 2**16


def build_door(backend: Backend, routes: Sequence[BaseRoute]) -> Door:
    """The guards of an application with these routes."""
    service, limits = backend.service, backend.service.limits
    bodies = {
        "/v1/predict": limits.max_image_bytes,
        "/v1/predict/batch": limits.max_batch_bytes,
        "/v1/patients/triage": limits.max_batch_bytes,
        "/v1/explain": limits.max_image_bytes,
        "/v1/submissions": limits.max_image_bytes,
        "/": limits.max_batch_bytes,
    }
    largest = {path: limit + _FORM_BYTES for path, limit in bodies.items()}
    settings = service.settings.admission
    admission = Admission(settings, service.oldest_wait_s, service.settings.retry_after_s)
    waiting = WaitingBodies(settings, admission.refusal)
    watch_admission(backend.sampler, backend.metrics, admission)

    def guard(app: ASGIApp) -> ASGIApp:
        # From the innermost to the outermost.
        app = AdmissionGuard(app, admission, waiting, largest)
        # Around it, since it reads bodies: they are bounded in length and in time from the first byte on.
        app = BodyLimit(app, largest | {LABELS_PATH: MAX_EXPORT_BYTES + _FORM_BYTES}, _FORM_BYTES)
        app = ReadDeadline(app, limits.max_pause_s, limits.min_bytes_per_s)
        app = Replays(app, service.settings.accept_replays)
        if backend.keys is not None:
            app = AccessGuard(app, backend.keys, backend.buckets)
        app = PageGuard(app, backend.sessions, backend.keys, backend.buckets)
        app = ArrivalTime(Unforeseen(NoticeHeader(app, NOTICE_HEADER, lambda: service.model.notice)))
        app = PageProblems(ProblemCounter(app, backend.metrics, routes, backend.problems), service)
        return SecurityHeaders(app, {DOCS_PATH: DOCS_POLICY})

    return Door(guard, largest)
