"""The service from Python: `DermrayClient`, or `serve.async_client.AsyncDermrayClient` for asyncio.

    with DermrayClient("http://127.0.0.1:8000") as client:
        answer = client.predict("lesion.jpg", {"age_approx": 60})

Imports neither Ray nor OpenCV.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar, Unpack

import httpx

from serve import client_calls as calls
from serve.api import Health, ModelCard, Prediction, Problem, View
from serve.client_calls import EvidenceMap, LesionOrigin, Metadata, PatientOrigin, Picture, PredictionFilters
from serve.client_errors import ConflictError, DermrayError, RefusedError, UnavailableError
from serve.client_exchange import Attempt, Call, RetryPolicy, Steps, Wait, Work, exchange
from serve.client_images import Image
from serve.client_options import http_options
from serve.client_polling import until_finished
from serve.record_api import Alarm, ErasureReport, Label, LabelledPrediction, LoggedPrediction, MonitoringSummary
from serve.submission_api import Submission, SubmissionAccepted
from serve.training_api import Approval, Candidate, Rejection, RetrainAccepted, Retraining, RollbackAsked, Trigger
from serve.triage_api import Triage

__all__ = [
    "ConflictError",
    "DermrayClient",
    "DermrayError",
    "RefusedError",
    "RetryPolicy",
    "UnavailableError",
]

Result = TypeVar("Result")


class DermrayClient:
    """Calls every route; for many threads at a time.

    Every method raises RefusedError (4xx; ConflictError for 409), UnavailableError (408, 429, 502 to 504, no answer, or
    none in time) or another DermrayError. Pictures are paths, bytes or binary files; `metadata` has the fields that
    `model().metadata_fields` lists.

    A request that failed is sent again where that is safe: reading always; scoring and submitting under one
    Idempotency-Key; labels, acknowledgements and erasures because the service does them once; `retrain` and `approve`
    only where the service cannot have begun. `Retry-After` is respected.

    Args:
        base_url: of the service, such as "http://127.0.0.1:8000".
        api_key: None takes the one of the environment variable DERMRAY_API_KEY.
        timeout_s: of one call with all its attempts and waits. A single picture's upload that makes progress may
            take longer.
        retries: how often, and after which waits.
        transport: httpx transport in place of the network.
        trust_env: whether proxies of the environment are used.
        sleep: waits for so many seconds.

    Raises:
        ValueError: `base_url` or the key is malformed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
        trust_env: bool = True,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self._timeout_s = timeout_s
        self._policy = retries or RetryPolicy()
        self._sleep = sleep
        self._http = httpx.Client(**http_options(base_url, api_key, trust_env), transport=transport)

    def __enter__(self) -> DermrayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _send(self, call: Call[Result]) -> Result:
        return self._run(exchange(call, self._policy, self._timeout_s))

    def _run(self, steps: Steps[Result]) -> Result:
        try:
            step = next(steps)
            while True:
                try:
                    came = self._carry_out(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(came)
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    def _carry_out(self, step: Attempt | Wait | Work) -> Any:
        match step:
            case Work(do):
                return do()
            case Wait(seconds):
                return self._sleep(seconds)
            case Attempt(method, path, content, timeout_s):
                deadline = self._policy.clock() + timeout_s
                with self._http.stream(method, path, timeout=timeout_s, **content) as response:
                    chunks = []
                    # The time-out of httpx is for each read: an answer that trickles in would never pass it.
                    for chunk in response.iter_bytes():
                        chunks.append(chunk)
                        if self._policy.clock() > deadline:
                            raise httpx.ReadTimeout(f"no whole answer within {timeout_s:g} s")
                headers = [item for item in response.headers.items() if item[0] != "content-encoding"]
                return httpx.Response(response.status_code, headers=headers, content=b"".join(chunks))

    def predict(self, image: Image, metadata: Metadata | None = None, **origin: Unpack[PatientOrigin]) -> Prediction:
        """Scores one lesion; when this returns, its record and picture are on disk. `risk` is None when abstained."""
        return self._send(calls.predict(image, metadata, origin))

    def predict_batch(
        self,
        images: Sequence[Image],
        metadata: Sequence[Metadata | None] | None = None,
        **origin: Unpack[PatientOrigin],
    ) -> list[Prediction | Problem]:
        """Scores many lesions, in their order; a picture or metadata that is wrong itself gives a Problem."""
        return self._send(calls.predict_batch(images, metadata, origin))

    def triage(
        self,
        images: Sequence[Image],
        patient_id: str,
        metadata: Sequence[Metadata | None] | None = None,
        **origin: Unpack[LesionOrigin],
    ) -> Triage:
        """Ranks all lesions of one patient, compared with each other; ConflictError where the model cannot."""
        return self._send(calls.triage(images, patient_id, metadata, origin))

    def explain(self, image: Image, view: View = "overlay", target_class: str | None = None) -> EvidenceMap:
        """Where the network sees evidence for a class, by default the likeliest malignant one."""
        return self._send(calls.explain(image, view, target_class))

    def submit(
        self, image: Image, metadata: Metadata | None = None, **origin: Unpack[PatientOrigin]
    ) -> SubmissionAccepted:
        """Queues one lesion; when this returns, it is on disk and will be scored."""
        return self._send(calls.submit(image, metadata, origin))

    def submission(self, submission_id: str) -> Submission:
        """What has become of a submission."""
        return self._send(calls.submission(submission_id))

    def wait_for_submission(self, submission_id: str, timeout_s: float = 300.0) -> Submission:
        """The submission once it is "done", with its `result`, or "failed", with its `error`.

        Raises:
            UnavailableError: it is neither after `timeout_s`.
        """
        call = calls.submission(submission_id)
        return self._run(until_finished(call, self._policy, self._timeout_s, timeout_s))

    def predictions(self, **filters: Unpack[PredictionFilters]) -> Iterator[LoggedPrediction]:
        """Records of the log that pass all filters, newest first; read page by page, `limit` records each."""
        cursor = None
        while True:
            page = self._send(calls.prediction_page(filters, cursor))
            yield from page.items
            if (cursor := page.next_cursor) is None:
                return

    def prediction(self, prediction_id: str) -> LabelledPrediction:
        """One record with its labels."""
        return self._send(calls.prediction(prediction_id))

    def image(self, prediction_id: str) -> Picture:
        """The picture of a record, as it was stored."""
        return self._send(calls.image(prediction_id))

    def label(
        self,
        prediction_id: str,
        label: str,
        *,
        labeller: str | None = None,
        confidence: float | None = None,
        comment: str | None = None,
        labelled_at: datetime | str | None = None,
        adjudication: bool = False,
    ) -> Label:
        """Stores an expert's label; what the labeller's latest one says already is not stored again."""
        call = calls.label(prediction_id, label, labeller, confidence, comment, labelled_at, adjudication)
        return self._send(call)

    def alarms(
        self,
        *,
        unacknowledged: bool = False,
        kind: str | None = None,
        quieted: bool | None = None,
        limit: int = 50,
    ) -> Iterator[Alarm]:
        """Alarms, newest first; read page by page, `limit` alarms each. `quieted`: only those that repeat an earlier
        one, or only the others."""
        cursor = None
        while True:
            page = self._send(calls.alarm_page(unacknowledged, kind, quieted, limit, cursor))
            yield from page.items
            if (cursor := page.next_cursor) is None:
                return

    def acknowledge(self, alarm_id: int, comment: str | None = None) -> Alarm:
        """Says that someone has seen an alarm; the first to do so stays on record."""
        return self._send(calls.acknowledge(alarm_id, comment))

    def summary(self, hours: int = 24) -> MonitoringSummary:
        """Figures of the last hours: predictions, abstentions, times, drift, alarms, labels."""
        return self._send(calls.summary(hours))

    def erase_patient(self, patient_id: str) -> ErasureReport:
        """Removes a patient's records, labels and pictures for good."""
        return self._send(calls.erase_patient(patient_id))

    def retrain(self, reason: str, trigger: Trigger = "manual") -> RetrainAccepted:
        """Asks for a training; one request per trigger is open at a time, and asking again answers with that one."""
        return self._send(calls.retrain(reason, trigger))

    def retrain_request(self, retrain_id: str) -> Retraining:
        """What has become of a request to train."""
        return self._send(calls.retrain_request(retrain_id))

    def retrain_requests(self, *, limit: int = 20) -> Iterator[Retraining]:
        """Requests to train, newest first; read page by page, `limit` requests each."""
        cursor = None
        while True:
            page = self._send(calls.retraining_page(limit, cursor))
            yield from page.items
            if (cursor := page.next_cursor) is None:
                return

    def candidates(self) -> list[Candidate]:
        """The newest candidates, newest first, with their metrics on the gate split and who approved them."""
        return self._send(calls.candidates())

    def approve(self, version: str, reason: str) -> Approval:
        """Approves a candidate in the key's name; ConflictError where it was decided already."""
        return self._send(calls.approve(version, reason))

    def reject(self, version: str, reason: str) -> Rejection:
        """Rejects a candidate in the key's name, for good; ConflictError where it was decided already."""
        return self._send(calls.reject(version, reason))

    def ask_rollback(self, version: str, reason: str) -> RollbackAsked:
        """Asks that champion `version` is left for the one before it; ConflictError where it is not the champion."""
        return self._send(calls.ask_rollback(version, reason))

    def model(self) -> ModelCard:
        """The model that answers now."""
        return self._send(calls.model())

    def ready(self) -> Health:
        """Whether every node answers; asked once, and an "unavailable" service is an answer, not an error."""
        return self._send(calls.ready())
