"""One lesion of a request: its fields checked, its picture decoded once, and the answer and the record made of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from modeling.metadata_record import clean_record
from modeling.preprocessing import UndecodableImageError, decode_image, image_quality, resize
from modeling.schema import TaskSpec
from serve.access import ANONYMOUS
from serve.errors import ApiError, invalid_field
from serve.settings import UploadLimits
from serve.times import EPOCH
from serve.upload import check_upload, sniff_format
from store.image_files import StoredImage, prepare_image, strip_jpeg_metadata
from store.tables import now_us

MAX_FIELD_LENGTH = 255
# Room for "/<index>", which a batch appends for each of its items.
_KEY = re.compile(r"[!-~]{1,200}")
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NOT_IN_LINES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
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


def decode_upload(data: bytes, limits: UploadLimits | None) -> np.ndarray:
    """Checks and decodes an uploaded file: uint8 RGB (H, W, 3), turned by its EXIF orientation.

    Raises:
        ApiError: 413, 415 or 422, see `check_upload`; 422 for a picture that does not decode.
    """
    return _decode(_readable(data, limits))


def prepare(data: bytes, input_size: int, limits: UploadLimits | None) -> PreparedImage:
    """Checks, decodes and resizes an uploaded file; without limits, one that was checked when it was uploaded.

    Raises:
        ApiError: see `decode_upload`.
    """
    readable = _readable(data, limits)
    image = _decode(readable)
    pixels = resize(image, input_size)
    return PreparedImage(pixels, image_quality(image, pixels), prepare_image(readable))


def _readable(data: bytes, limits: UploadLimits | None) -> bytes:
    """What the decoder gets. Of a JPEG that is what will be kept: no profile, thumbnail or second picture behind the
    first comes near the decoder, and what is scored is what can be looked at later."""
    image_format = sniff_format(data) if limits is None else check_upload(data, limits)
    if image_format != "jpeg":
        return data
    try:
        return strip_jpeg_metadata(data)
    except ValueError as error:
        raise _undecodable(error) from error


def _decode(data: bytes) -> np.ndarray:
    try:
        return decode_image(data)
    except UndecodableImageError as error:
        raise _undecodable(error) from error


def _undecodable(error: ValueError) -> ApiError:
    return ApiError(422, "undecodable_image", f"image: {' '.join(str(error).split())}")


def prepare_or_error(data: bytes, input_size: int, limits: UploadLimits | None) -> PreparedImage | ApiError:
    """As `prepare`; the error is returned: one bad picture of a batch is its own business."""
    try:
        return prepare(data, input_size, limits)
    except ApiError as error:
        return error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {name[:60]!r} twice")
    return found


def parse_json(text: str, field: str) -> Any:
    """Decodes a form field's JSON; NaN, Infinity and keys that an object repeats are refused.

    Raises:
        ApiError: 422 naming the field.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
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


def parse_text(
    value: str | None, field: str, max_length: int = MAX_FIELD_LENGTH, multiline: bool = False
) -> str | None:
    """An optional text field of at most `max_length` printable characters; blank counts as absent.

    Args:
        multiline: line breaks and tabs are allowed.

    Raises:
        ApiError: 422 naming the field.
    """
    text = (value or "").strip()
    if len(text) > max_length:
        raise invalid_field(f"{field}: {len(text)} characters; expected at most {max_length}")
    if (_NOT_IN_LINES if multiline else _NOT_PRINTABLE).search(text):
        raise invalid_field(f"{field}: {text!r}; expected text without control characters")
    return text or None


def parse_time(value: str | None, field: str) -> int | None:
    """ISO 8601 date and time, 1970 to 9999, as microseconds since the epoch; without an offset it is UTC.

    Raises:
        ApiError: 422 naming the field.
    """
    text = parse_text(value, field)
    if text is None:
        return None
    expected = "expected an ISO 8601 time such as 2024-05-01T09:30:00Z, from 1970 on"
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        microseconds = (moment - EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise invalid_field(f"{field}: {text!r}; {expected}") from error
    if microseconds < 0:
        raise invalid_field(f"{field}: {text!r}; {expected}")
    return microseconds


def parse_past_time(value: str | None, field: str) -> int | None:
    """`parse_time` of something that has happened; a day ahead is left for clocks and time zones.

    Raises:
        ApiError: 422 for another format, a time before 1970, or one over a day ahead.
    """
    microseconds = parse_time(value, field)
    if microseconds is not None and microseconds > now_us() + _DAY_US:
        raise invalid_field(f"{field}: {value!r}; expected a time that has come")
    return microseconds


def parse_acquired_at(value: str | None) -> int | None:
    """`parse_past_time` of the field `acquired_at`."""
    return parse_past_time(value, "acquired_at")


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
    where it may be larger than an upload may be (a WebP is kept as PNG). `received_at`: when it came in, microseconds
    since the epoch, UTC; an erasure of the patient after it keeps it out of the log.
    """

    image: bytes
    metadata: Mapping[str, float | str | None] | None = None
    origin: Origin = Origin()
    idempotency_key: str | None = None
    caller: str = ANONYMOUS.name
    stored: bool = False
    received_at: int = field(default_factory=now_us)
