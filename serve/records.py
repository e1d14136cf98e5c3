"""Reads and annotates the log for people: records, pictures, labels, alarms, figures, erasure. Without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from monitoring.prediction_log import PredictionLog, patient_hmac
from serve.errors import ApiError, unavailable
from serve.lesion import keyed_id
from serve.store_calls import StoreCalls
from store.alarm_records import acknowledge_alarm, alarms_page
from store.database import Store
from store.dataset_lineage import Use, lineage_of_prediction
from store.erasure import Erasure, PatientErasure
from store.labels import AddedLabel, NewLabel, ReaderAdjudicatesError, add_label
from store.monitoring_summary import monitoring_summary
from store.prediction_records import (
    PredictionFilter,
    prediction_image,
    prediction_with_labels,
    predictions_by_id,
    predictions_page,
)
from store.review_queue import ReviewQueue, patient_lesions, review_queue
from store.tables import now_us

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")


def not_found(detail: str, error: str = "not_found") -> ApiError:
    """404 with a reason."""
    return ApiError(404, error, detail)


class RecordService:
    """The store's side of one ingress replica.

    Every method raises ApiError 503 while the database or the image store does not answer.

    Args:
        log: this node's log, whose spool may hold records that the store does not have yet.
        patient_key: secret behind patient pseudonyms.
        retry_after_s: what a 503 tells the client.
    """

    def __init__(self, log: PredictionLog, patient_key: bytes, retry_after_s: int):
        self._log = log
        self._patient_key = patient_key
        self._retry_after_s = retry_after_s
        self._call = StoreCalls(log, retry_after_s, "records")

    def pseudonym(self, patient_id: str) -> str:
        """The HMAC under which a patient's records are stored."""
        return patient_hmac(patient_id, self._patient_key)

    async def page(self, wanted: PredictionFilter, after: tuple[int, str] | None, limit: int) -> list[dict[str, Any]]:
        """See `predictions_page`."""
        return await self._call(predictions_page, wanted, after, limit)

    async def record(self, prediction_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A record and its labels, oldest first.

        Raises:
            ApiError: 404; 503 when the record may be among those that wait in this node's spool.
        """
        return await self._call(self._known, prediction_id, prediction_with_labels)

    async def of_keys(self, caller: str, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """The records of a caller's idempotency keys, in their order; None for a key without one.

        Raises:
            ApiError: 503 also when some may be among the records that wait in this node's spool.
        """
        ids = [keyed_id(caller, key) for key in keys]

        def find(store: Store) -> list[dict[str, Any] | None]:
            # Looked at first, as in `_known`.
            waiting = self._log.spool.pending()
            found = predictions_by_id(store, ids)
            if waiting and len(found) < len(ids):
                detail = "results: some may be among the records that wait for the store"
                raise unavailable(detail, self._retry_after_s)
            return [found.get(prediction_id) for prediction_id in ids]

        return await self._call(find)

    async def used_in(self, prediction_id: str) -> list[Use]:
        """See `lineage_of_prediction`."""
        return await self._call(lineage_of_prediction, prediction_id)

    async def image_name(self, prediction_id: str) -> tuple[str, str]:
        """Hash and suffix of a record's picture.

        Raises:
            ApiError: 404 and 503 as in `record`; 404 `image_erased` for a record whose picture is no longer kept.
        """
        name, suffix = await self._call(self._known, prediction_id, prediction_image)
        if name is None or suffix is None:
            raise _erased(prediction_id)
        return name, suffix

    async def image(self, prediction_id: str, name: str, suffix: str) -> bytes:
        """The stored bytes of `image_name`.

        Raises:
            ApiError: 404 `image_erased`.
        """
        return await self._call(self._read_image, prediction_id, name, suffix)

    def _read_image(self, _store: Store, prediction_id: str, name: str, suffix: str) -> bytes:
        try:
            return self._log.image_files.get(name, suffix)
        except FileNotFoundError as error:
            raise _erased(prediction_id) from error

    async def label(self, label: NewLabel, actor: str) -> AddedLabel:
        """Stores a label; see `add_label`.

        Raises:
            ApiError: 404 and 503 as in `record`; 409 `reader_adjudicates`.
        """

        def add(store: Store, _prediction_id: str) -> AddedLabel | None:
            try:
                return add_label(store, label, actor)
            except ReaderAdjudicatesError as error:
                raise ApiError(409, "reader_adjudicates", str(error)) from error

        added = await self._call(self._known, label.prediction_id, add)
        if added.alarm is not None:
            # As an error: in throughput mode Serve's logger holds back what is below.
            logger.error("ALARM %s: %s", added.alarm["kind"], added.alarm["message"])
        return added

    def _known(self, store: Store, prediction_id: str, find: Callable[..., Result | None]) -> Result:
        # Looked at first: a record that is replayed between the two is found, not missed.
        waiting = self._log.spool.pending()
        found = find(store, prediction_id)
        if found is not None:
            return found
        if waiting:
            detail = f"prediction_id: {prediction_id!r} may be among the records that wait for the store"
            raise unavailable(detail, self._retry_after_s)
        raise not_found(f"prediction_id: {prediction_id!r} is not in the log: never made, or erased")

    async def review_queue(self, reader: str, since_us: int, skipped: frozenset[str]) -> ReviewQueue:
        """See `review_queue`."""
        return await self._call(review_queue, reader, since_us, skipped)

    async def patient_lesions(self, prediction_id: str) -> list[dict[str, Any]]:
        """See `patient_lesions`."""
        return await self._call(patient_lesions, prediction_id)

    async def alarms(
        self,
        unacknowledged: bool,
        kind: str | None,
        after: tuple[int, int] | None,
        limit: int,
        quieted: bool | None = None,
    ) -> list[dict[str, Any]]:
        """See `alarms_page`."""
        return await self._call(alarms_page, unacknowledged, kind, after, limit, quieted)

    async def acknowledge(self, alarm_id: int, actor: str, comment: str | None) -> dict[str, Any]:
        """See `acknowledge_alarm`.

        Raises:
            ApiError: 404.
        """
        row = await self._call(acknowledge_alarm, alarm_id, actor, comment)
        if row is None:
            raise not_found(f"alarm_id: there is no alarm {alarm_id}")
        return row

    async def summary(self, hours: int) -> dict[str, Any]:
        """See `monitoring_summary`; the window ends now."""
        return await self._call(monitoring_summary, now_us(), hours)

    async def erase_patient(self, patient_id: str, actor: str) -> Erasure:
        """Removes everything of a patient; see `PatientErasure`.

        Raises:
            ApiError: 503 when it was interrupted: the same call again finishes it.
        """

        def erase(store: Store) -> Erasure:
            erasure = PatientErasure(store, self._log.image_files, self._log.spool)
            return erasure.erase(self.pseudonym(patient_id), actor)

        return await self._call(erase)


def _erased(prediction_id: str) -> ApiError:
    return not_found(f"the picture of prediction {prediction_id!r} is no longer kept", "image_erased")
