"""Submissions as the ingress accepts and shows them: checked and on disk before the 202, then the worker's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monitoring.prediction_log import PredictionLog
from serve.access import Caller
from serve.errors import ApiError, invalid_field, patient_erased
from serve.lesion import Origin
from serve.prediction_service import PredictionService
from serve.settings import SubmissionSettings
from serve.store_calls import StoreCalls
from store.database import Store
from store.erased_patients import PatientErasedError
from store.erasure import remove_unused
from store.image_files import StoredImage
from store.submissions import (
    OtherContentError,
    QueueFullError,
    check_submission,
    find_submission,
    insert_submission,
)
from store.tables import now_us


class SubmissionQueue:
    """Takes submissions of one ingress replica's clients.

    Args:
        log: the store and the image files; the database is opened on first use.
        wake: called after each new submission.
    """

    def __init__(
        self,
        service: PredictionService,
        log: PredictionLog,
        settings: SubmissionSettings,
        wake: Callable[[], None],
    ):
        self._service = service
        self._images = log.image_files
        self._records = StoreCalls(log, service.settings.retry_after_s, "submissions", threads=2)
        self._settings = settings
        self._wake = wake

    async def accept(
        self,
        caller: str,
        key: str | None,
        image: bytes,
        metadata: Mapping[str, float | str | None] | None,
        origin: Origin,
        received_at: int,
    ) -> dict[str, Any]:
        """The submission's row, once it and the picture are on disk.

        Raises:
            ApiError: 410, 413, 415 or 422 as for /v1/predict, 422 for a key that stands for something else, 429 while
                too many wait, 503 when the store takes nothing.
        """
        stored = await self._service.check_image(image)
        request = {
            "image_hash": stored.hash,
            "image_suffix": stored.suffix,
            # A later model may not have every field that this one fills with null.
            "metadata": metadata and {name: value for name, value in metadata.items() if value is not None},
            "patient_hmac": self._service.pseudonym(origin),
            "institution": origin.institution,
            "device": origin.device,
            "acquired_at": origin.acquired_at,
        }
        try:
            row, new = await self._records(self._insert, caller, key, request, stored, received_at)
        except QueueFullError as error:
            limit = self._settings.max_pending
            wait = self._service.settings.retry_after_s
            raise ApiError(
                429, "queue_full", f"{limit} submissions wait (max_pending); send it again later", wait
            ) from (error)
        except PatientErasedError as error:
            raise patient_erased() from error
        except OtherContentError as error:
            raise invalid_field("Idempotency-Key: this key was used for another submission; send a new one") from error
        if new:
            self._wake()
        return row

    def _insert(
        self,
        store: Store,
        caller: str,
        key: str | None,
        request: dict[str, Any],
        stored: StoredImage,
        received_at: int,
    ) -> tuple[dict[str, Any], bool]:
        max_pending = self._settings.max_pending
        # Before the picture is written: what is refused must not fill the disk.
        known = check_submission(store, caller, key, request, max_pending)
        if known is not None:
            return known, False
        image_row = {
            "hash": stored.hash,
            "suffix": stored.suffix,
            "num_bytes": len(stored.data),
            "stored_at": now_us(),
        }
        try:
            # No erasure removes the file of another patient's equal picture between the file and its row.
            with self._images.locked():
                self._images.put(stored.data, stored.suffix)
                return insert_submission(store, caller, key, request, image_row, max_pending, received_at)
        except PatientErasedError:
            remove_unused(store, self._images, [stored.hash])
            raise

    async def find(self, submission_id: str, caller: Caller) -> dict[str, Any] | None:
        """The row, or None where there is none that this caller may see: its own, or any for a reviewer and above.

        Raises:
            ApiError: 503 when the store does not answer.
        """
        row = await self._records(find_submission, submission_id)
        return row if row is not None and (caller.role != "caller" or row["caller"] == caller.name) else None
