"""The service from asyncio: the methods of `serve.client.DermrayClient`, awaited.

async with AsyncDermrayClient("http://127.0.0.1:8000") as client:
    answer = await client.predict("lesion.jpg", {"age_approx": 60})
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar, Unpack

import httpx

from serve import client_calls as calls
from serve.api import Health, ModelCard, Prediction, Problem, View
from serve.client_calls import EvidenceMap, LesionOrigin, Metadata, PatientOrigin, Picture, PredictionFilters
from serve.client_exchange import Attempt, Call, RetryPolicy, Steps, Wait, Work, exchange
from serve.client_images import Image
from serve.client_options import http_options
from serve.client_polling import until_finished
from serve.record_api import Alarm, ErasureReport, Label, LabelledPrediction, LoggedPrediction, MonitoringSummary
from serve.submission_api import Submission, SubmissionAccepted
from serve.training_api import Approval, Candidate, Rejection, RetrainAccepted, Retraining, RollbackAsked, Trigger
from serve.triage_api import Triage

Result = TypeVar("Result")


class AsyncDermrayClient:
    """As `DermrayClient`, for one event loop; a cancelled call sends nothing more.

    Args:
        timeout_s: of one call with all its attempts and waits.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        trust_env: bool = True,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ):
        self._timeout_s = timeout_s
        self._policy = retries or RetryPolicy()
        self._sleep = sleep
        self._http = httpx.AsyncClient(**http_options(base_url, api_key, trust_env), transport=transport)

    async def __aenter__(self) -> AsyncDermrayClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _send(self, call: Call[Result]) -> Result:
        return await self._run(exchange(call, self._policy, self._timeout_s))

    async def _run(self, steps: Steps[Result]) -> Result:
        try:
            step = next(steps)
            while True:
                try:
                    came = await self._carry_out(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(came)
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    async def _carry_out(self, step: Attempt | Wait | Work) -> Any:
        match step:
            case Work(do):
                return await asyncio.to_thread(do)
            case Wait(seconds):
                return await self._sleep(seconds)
            case Attempt(method, path, content, timeout_s):
                try:
                    async with asyncio.timeout(timeout_s):
                        return await self._http.request(method, path, timeout=timeout_s, **content)
                except TimeoutError as error:
                    raise httpx.ReadTimeout(f"no whole answer within {timeout_s:g} s") from error

    async def predict(
        self, image: Image, metadata: Metadata | None = None, **origin: Unpack[PatientOrigin]
    ) -> Prediction:
        """See `DermrayClient.predict`."""
        return await self._send(calls.predict(image, metadata, origin))

    async def predict_batch(
        self,
        images: Sequence[Image],
        metadata: Sequence[Metadata | None] | None = None,
        **origin: Unpack[PatientOrigin],
    ) -> list[Prediction | Problem]:
        """See `DermrayClient.predict_batch`."""
        return await self._send(calls.predict_batch(images, metadata, origin))

    async def triage(
        self,
        images: Sequence[Image],
        patient_id: str,
        metadata: Sequence[Metadata | None] | None = None,
        **origin: Unpack[LesionOrigin],
    ) -> Triage:
        """See `DermrayClient.triage`."""
        return await self._send(calls.triage(images, patient_id, metadata, origin))

    async def explain(self, image: Image, view: View = "overlay", target_class: str | None = None) -> EvidenceMap:
        """See `DermrayClient.explain`."""
        return await self._send(calls.explain(image, view, target_class))

    async def submit(
        self, image: Image, metadata: Metadata | None = None, **origin: Unpack[PatientOrigin]
    ) -> SubmissionAccepted:
        """See `DermrayClient.submit`."""
        return await self._send(calls.submit(image, metadata, origin))

    async def submission(self, submission_id: str) -> Submission:
        """See `DermrayClient.submission`."""
        return await self._send(calls.submission(submission_id))

    async def wait_for_submission(self, submission_id: str, timeout_s: float = 300.0) -> Submission:
        """See `DermrayClient.wait_for_submission`."""
        call = calls.submission(submission_id)
        return await self._run(until_finished(call, self._policy, self._timeout_s, timeout_s))

    async def predictions(self, **filters: Unpack[PredictionFilters]) -> AsyncIterator[LoggedPrediction]:
        """See `DermrayClient.predictions`."""
        cursor = None
        while True:
            page = await self._send(calls.prediction_page(filters, cursor))
            for item in page.items:
                yield item
            if (cursor := page.next_cursor) is None:
                return

    async def prediction(self, prediction_id: str) -> LabelledPrediction:
        """See `DermrayClient.prediction`."""
        return await self._send(calls.prediction(prediction_id))

    async def image(self, prediction_id: str) -> Picture:
        """See `DermrayClient.image`."""
        return await self._send(calls.image(prediction_id))

    async def label(
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
        """See `DermrayClient.label`."""
        call = calls.label(prediction_id, label, labeller, confidence, comment, labelled_at, adjudication)
        return await self._send(call)

    async def alarms(
        self,
        *,
        unacknowledged: bool = False,
        kind: str | None = None,
        quieted: bool | None = None,
        limit: int = 50,
    ) -> AsyncIterator[Alarm]:
        """See `DermrayClient.alarms`."""
        cursor = None
        while True:
            page = await self._send(calls.alarm_page(unacknowledged, kind, quieted, limit, cursor))
            for item in page.items:
                yield item
            if (cursor := page.next_cursor) is None:
                return

    async def acknowledge(self, alarm_id: int, comment: str | None = None) -> Alarm:
        """See `DermrayClient.acknowledge`."""
        return await self._send(calls.acknowledge(alarm_id, comment))

    async def summary(self, hours: int = 24) -> MonitoringSummary:
        """See `DermrayClient.summary`."""
        return await self._send(calls.summary(hours))

    async def erase_patient(self, patient_id: str) -> ErasureReport:
        """See `DermrayClient.erase_patient`."""
        return await self._send(calls.erase_patient(patient_id))

    async def retrain(self, reason: str, trigger: Trigger = "manual") -> RetrainAccepted:
        """See `DermrayClient.retrain`."""
        return await self._send(calls.retrain(reason, trigger))

    async def retrain_request(self, retrain_id: str) -> Retraining:
        """See `DermrayClient.retrain_request`."""
        return await self._send(calls.retrain_request(retrain_id))

    async def retrain_requests(self, *, limit: int = 20) -> AsyncIterator[Retraining]:
        """See `DermrayClient.retrain_requests`."""
        cursor = None
        while True:
            page = await self._send(calls.retraining_page(limit, cursor))
            for item in page.items:
                yield item
            if (cursor := page.next_cursor) is None:
                return

    async def candidates(self) -> list[Candidate]:
        """See `DermrayClient.candidates`."""
        return await self._send(calls.candidates())

    async def approve(self, version: str, reason: str) -> Approval:
        """See `DermrayClient.approve`."""
        return await self._send(calls.approve(version, reason))

    async def reject(self, version: str, reason: str) -> Rejection:
        """See `DermrayClient.reject`."""
        return await self._send(calls.reject(version, reason))

    async def ask_rollback(self, version: str, reason: str) -> RollbackAsked:
        """See `DermrayClient.ask_rollback`."""
        return await self._send(calls.ask_rollback(version, reason))

    async def model(self) -> ModelCard:
        """See `DermrayClient.model`."""
        return await self._send(calls.model())

    async def ready(self) -> Health:
        """See `DermrayClient.ready`."""
        return await self._send(calls.ready())
