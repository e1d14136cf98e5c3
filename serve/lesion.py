"""One lesion of a request: its fields checked, its picture decoded once, and the answer and the record made of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from modeling.metadata_record import clean_record
from modeling.preprocessing import UndecodableImageError, decode_image, image_quality, resize
from modeling.schema import TaskSpec
from serve.access import ANONYMOUS
from serve.errors import ApiError, invalid_field
from serve.settings import UploadLimits
from serve.upload import check_upload
from store.image_files import StoredImage, prepare_image
from store.tables import now_us

MAX_FIELD_LENGTH = 255
# Room for "/<index>", which a batch appends for each of its items.
_KEY = re.compile(r"[!-~]{1,200}")
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Origin:
    """Who and what a picture comes from; all optional.

    `patient_hmac`: the patient's pseudonym, where the id is no longer known. `acquired_at`: microseconds since the
    epoch, UTC.
    """

    patient_id: str | None = None
    patient_hmac: str | None = None
    institution: str | None = None
    device: str | None = None
    acquired_at: int | None = None


@dataclass(frozen=True)
class PreparedImage:
    """A decoded picture.

    Attributes:
        pixels: uint8 RGB (S, S, 3), the network's input.
        quality: figures of the whole picture, see `image_quality`.
        stored: the bytes that are kept.
    """

    pixels: np.ndarray
    quality: dict[str, float]
    stored: StoredImage


def prepare(data: bytes, input_size: int, limits: UploadLimits | None) -> PreparedImage:
    """Checks, decodes and resizes an uploaded file; without limits, one that was checked when it was uploaded.

    Raises:
        ApiError: 413, 415 or 422, see `check_upload`; 422 for a picture that does not decode.
    """
    if limits is not None:
        check_upload(data, limits)
    try:
        image = decode_image(data)
        stored = prepare_image(data)
    except UndecodableImageError as error:
        raise ApiError(422, "undecodable_image", f"image: {error}") from error
    except ValueError as error:
        raise ApiError(422, "undecodable_image", f"image: {str(error).removeprefix('image: ')}") from error
    return PreparedImage(resize(image, input_size), image_quality(image), stored)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str, field: str) -> Any:
    """Decodes a form field's JSON; NaN and Infinity are refused.

    Raises:
        ApiError: 422 naming the field.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid_field(f"{field}: not valid JSON: {reason}") from error


def parse_metadata(metadata: Any, task: TaskSpec) -> dict[str, float | str | None] | None:
    """One lesion's decoded metadata, checked against the task; None stays None.

    Raises:
        ApiError: 422 naming the field.
    """
    if metadata is None:
        return None
    try:
        record = clean_record(task, metadata)
    except ValueError as error:
        raise invalid_field(str(error)) from error
    for name, value in record.items():
        if isinstance(value, str) and _NOT_PRINTABLE.search(value):
            raise invalid_field(f"metadata field {name!r} is {value!r}; expected text without control characters")
    return record


def parse_text(value: str | None, field: str) -> str | None:
    """An optional text field of at most 255 printable characters; blank counts as absent.

    Raises:
        ApiError: 422 naming the field.
    """
    text = (value or "").strip()
    if len(text) > MAX_FIELD_LENGTH:
        raise invalid_field(f"{field}: {len(text)} characters; expected at most {MAX_FIELD_LENGTH}")
    if _NOT_PRINTABLE.search(text):
        raise invalid_field(f"{field}: {text!r}; expected text without control characters")
    return text or None


def parse_acquired_at(value: str | None) -> int | None:
    """ISO 8601 date and time as microseconds since the epoch; without an offset it is UTC.

    Raises:
        ApiError: 422 for another format, a time before 1970, or one over a day ahead.
    """
    text = parse_text(value, "acquired_at")
    if text is None:
        return None
    expected = "expected an ISO 8601 time such as 2024-05-01T09:30:00Z"
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        microseconds = math.floor(moment.timestamp() * 1e6)
    except (ValueError, OverflowError) as error:
        raise invalid_field(f"acquired_at: {text!r}; {expected}") from error
    if not 0 <= microseconds <= now_us() + _DAY_US:
        raise invalid_field(f"acquired_at: {text!r}; {expected}, from 1970 to now")
    return microseconds


def parse_key(value: str | None) -> str | None:
    """An idempotency key, 1 to 200 visible ASCII characters.

    Raises:
        ApiError: 422 naming the header.
    """
    if value is not None and not _KEY.fullmatch(value):
        raise invalid_field("Idempotency-Key: expected 1 to 200 visible ASCII characters")
    return value


def keyed_id(caller: str, key: str) -> str:
    """The prediction id of an idempotency key: a repeated request, even to another replica, has the same one."""
    return hashlib.sha256(json.dumps([caller, key]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class LesionRequest:
    """One picture with what was said of it, fields already checked; `metadata` None when none was given.

    `caller`: who sent it; idempotency keys are the caller's own. `stored`: the picture comes from the image store,
    where it may be larger than an upload may be (a WebP is kept as PNG).
    """

    image: bytes
    metadata: Mapping[str, float | str | None] | None = None
    origin: Origin = Origin()
    idempotency_key: str | None = None
    caller: str = ANONYMOUS.name
    stored: bool = False
