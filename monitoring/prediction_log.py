"""The one record of a prediction: its format, its writer and its reader.

Serve replicas import this module: it imports no ray, no pandas, no mlflow, no evidently.
"""

from __future__ import annotations

import hmac
import logging
import math
import threading
import uuid
from collections.abc import Collection, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from modeling.image_limits import QUALITY_NAMES as QUALITY_NAMES
from store.database import LOG_WRITER, Inserted, Store, StoreUnavailableError, open_store
from store.erasure import PatientErasure, remove_unused
from store.image_files import ImageFiles, image_suffix
from store.spool import Spool
from store.tables import now_us

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

EMBEDDING_DIM = 64
EMBEDDING_NAMES = tuple(f"embedding_{index:02d}" for index in range(EMBEDDING_DIM))


class PredictionRecord(BaseModel):
    """One answered request, as stored; field names are column names.

    Times are microseconds since the epoch, UTC. `received_at` decides the day a row belongs to. `embedding` is
    `encode_embedding` of the 64-d projection. An abstained answer has `risk` None and its `reasons`; its scores may
    still be there. `patient_hmac` comes from `patient_hmac()`, never a patient id.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1, max_length=64)
    idempotency_key: str | None = Field(default=None, max_length=255)
    received_at: int = Field(default_factory=now_us)
    acquired_at: int | None = None
    caller: str = Field(default="anonymous", max_length=255)
    role: Literal["champion", "shadow"] = "champion"
    patient_hmac: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    institution: str | None = Field(default=None, max_length=255)
    device: str | None = Field(default=None, max_length=255)
    image_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    model_version: str = Field(max_length=64)
    context: Literal["image_only", "none", "patient"]
    metadata: dict[str, Any] = Field(default_factory=dict)
    image_score: float | None = None
    class_probabilities: dict[str, float] | None = None
    risk: float | None = None
    band: Literal["low", "moderate", "high"] | None = None
    threshold: float | None = None
    abstained: bool = False
    reasons: list[str] = Field(default_factory=list)
    brightness: float | None = None
    contrast: float | None = None
    blur: float | None = None
    red: float | None = None
    green: float | None = None
    blue: float | None = None
    embedding: bytes | None = None
    stage_ms: dict[str, float] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _no_nan_in_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {
            key: None if isinstance(item, float) and not math.isfinite(item) else item for key, item in value.items()
        }

    @field_validator("embedding")
    @classmethod
    def _whole_embedding(cls, value: bytes | None) -> bytes | None:
        if value is not None and len(value) != 2 * EMBEDDING_DIM:
            raise ValueError(f"embedding has {len(value)} bytes; expected {2 * EMBEDDING_DIM} (64 float16)")
        return value

    def to_row(self) -> dict[str, Any]:
        """The record as a row of the `predictions` table."""
        return self.model_dump()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PredictionRecord:
        """The record of a `predictions` row."""
        return cls.model_validate(dict(row))


def encode_embedding(projection: np.ndarray) -> bytes:
    """A projected embedding, floats (64,), as 128 bytes of little-endian float16."""
    values = np.asarray(projection, dtype=np.float32).reshape(-1)
    if values.shape != (EMBEDDING_DIM,):
        raise ValueError(f"embedding projection has {values.size} values; expected {EMBEDDING_DIM}")
    limit = np.finfo(np.float16).max
    return np.clip(values, -limit, limit).astype("<f2").tobytes()


def decode_embedding(data: bytes) -> np.ndarray:
    """The inverse of `encode_embedding`: float32 (64,)."""
    return np.frombuffer(data, dtype="<f2").astype(np.float32)


def patient_hmac(patient_id: str, key: bytes | str) -> str:
    """Pseudonym of a patient: hex HMAC-SHA256 of the id. Equal ids give equal pseudonyms under one key."""
    secret = key.encode() if isinstance(key, str) else key
    if not secret:
        raise ValueError("patient HMAC key is empty; expected a secret")
    return hmac.new(secret, patient_id.encode(), "sha256").hexdigest()


class PredictionLog:
    """Writes and reads records; opens the store on first use, so it can be made (and spool) while the store is down."""

    def __init__(self, store_url: str, images_url: str, spool_dir: str):
        self.store_url = store_url
        self.image_files = ImageFiles(images_url)
        self.spool = Spool(spool_dir)
        self._lock = threading.Lock()
        self._opening: Future[Store] | None = None

    @property
    def store(self) -> Store:
        """The store, opened once.

        Threads that ask while it is being opened share the attempt and its failure: behind a database that hangs, each
        would else wait for those before it, and then for its own.

        Raises:
            ValueError, StoreUnavailableError: see `open_store`; the next call tries again.
        """
        with self._lock:
            opening, mine = self._opening, self._opening is None
            if opening is None:
                opening = self._opening = Future()
        if mine:
            try:
                opening.set_result(open_store(self.store_url))
            except BaseException as error:
                self._opening = None
                opening.set_exception(error)
        return opening.result()

    def write(
        self, records: Sequence[PredictionRecord], images: Mapping[str, bytes], on_disk: Set[str] = frozenset()
    ) -> Inserted:
        """Puts images (stored bytes by hash) on disk, then all rows in one transaction.

        Idempotent on record id and on (caller, idempotency key): the first row stays. A record whose patient was erased
        after it was received is left out, and its image with it.

        Args:
            on_disk: which of the images `image_files.put_many` has written before; one that is gone is written again.

        Raises:
            StoreUnavailableError: nothing was promised; write again or spool.
        """
        return self._write_rows([record.to_row() for record in records], images, on_disk)

    def spool_records(self, records: Sequence[PredictionRecord], images: Mapping[str, bytes]) -> None:
        """Puts records and images into the local spool, on disk when this returns.

        Raises:
            OSError: the spool folder cannot be written.
        """
        self.spool.append([record.to_row() for record in records], images)

    def replay_spool(self) -> int:
        """Writes all spooled batches to the store; returns the rows replayed, late ones of erased patients included.

        Raises:
            StoreUnavailableError: the store is still away; the rest stays spooled.
            ValueError: what is there is no store of this release; everything stays spooled.
        """
        # Opened before the replay, which takes a ValueError for a fault of the batch.
        assert self.store is not None
        return self.spool.replay(lambda rows, images: self._write_rows(rows, images))

    def remove_unnamed(self, hashes: Collection[str]) -> int:
        """Removes files of images that neither a prediction nor a submission names; returns how many.

        Raises:
            StoreUnavailableError: the store does not say which are named; no more files were removed.
            OSError: a file cannot be removed.
        """
        return sum(remove_unused(self.store, self.image_files, [name]) for name in hashes)

    def find_by_idempotency_key(self, caller: str, key: str) -> PredictionRecord | None:
        """The record this caller stored under this key, or None."""
        row = self.store.find_by_idempotency_key(caller, key)
        return None if row is None else PredictionRecord.from_row(row)

    def read_window(self, start_us: int, end_us: int, role: str = "champion") -> pd.DataFrame:
        """See `read_window`."""
        return read_window(self.store, start_us, end_us, role)

    def _write_rows(
        self, rows: list[dict[str, Any]], images: Mapping[str, bytes], on_disk: Set[str] = frozenset()
    ) -> Inserted:
        try:
            # Shared: an erasure may not remove a file between its writing and the row that needs it.
            with self.image_files.locked(exclusive=False):
                missing = {
                    name: data
                    for name, data in images.items()
                    if name not in on_disk or not self.image_files.exists(name, image_suffix(data))
                }
                hashes = self.image_files.put_many(missing.values())
                wrong = [given for given, real in zip(missing, hashes, strict=True) if given != real]
                if wrong:
                    raise ValueError(
                        f"image {wrong[0]} does not hash to its name; expected the SHA-256 of the stored bytes"
                    )
                stored_at = now_us()
                image_rows = [
                    {"hash": name, "suffix": image_suffix(data), "num_bytes": len(data), "stored_at": stored_at}
                    for name, data in images.items()
                ]
                inserted = self.store.insert_predictions(rows, image_rows)
        except OSError as error:
            raise StoreUnavailableError(f"images cannot be written to {self.image_files.url}: {error}") from error
        for patient in {rows[place]["patient_hmac"] for place in inserted.late}:
            self._remove_late_images(patient)
        return inserted

    def _remove_late_images(self, patient: str) -> None:
        logger.warning("records of a patient who was erased after they were received were left out")
        try:
            PatientErasure(self.store, self.image_files, self.spool).remove_files(patient, LOG_WRITER)
        except (OSError, StoreUnavailableError) as error:
            # The other records are stored. The audit trail lists the pictures, for the next erasure of this patient.
            logger.error("pictures of erased patient %s remain, erase again: %s", patient[:12], error)


def read_window(store: Store, start_us: int, end_us: int, role: str = "champion") -> pd.DataFrame:
    """Records with start_us <= received_at < end_us, by (received_at, id), as one flat table.

    Columns: the record's scalar fields, `group` (the patient's HMAC, else the row's own id), one `meta.<column>`
    per metadata column seen, `embedding_00`..`embedding_63` (float32, NaN without an embedding).
    """
    import pandas as pd

    rows = list(store.predictions_between(start_us, end_us, role))
    scalars = [
        name
        for name in PredictionRecord.model_fields
        if name not in ("metadata", "class_probabilities", "reasons", "embedding", "stage_ms")
    ]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in scalars}
    columns["group"] = [row["patient_hmac"] or row["id"] for row in rows]
    for name in sorted({name for row in rows for name in row["metadata"]}):
        columns[f"meta.{name}"] = [row["metadata"].get(name) for row in rows]
    embeddings = np.full((len(rows), EMBEDDING_DIM), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        if row["embedding"] is not None:
            embeddings[index] = decode_embedding(row["embedding"])
    columns.update(zip(EMBEDDING_NAMES, embeddings.T, strict=True))
    return pd.DataFrame(columns)
