"""Experts' labels from files: Label Studio's exports (JSON, JSON-MIN) and plain CSV. What cannot be read is listed with
its reason, never silently dropped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from store.label_studio import CLASS, Annotation, Classes, annotations
from store.labels import NewLabel
from store.tables import now_us

LABEL_STUDIO, CSV = "label_studio", "csv"
REQUIRED = ("prediction_id", "label", "labeller", "labelled_at")
OPTIONAL = ("confidence", "comment", "adjudication")
MAX_COMMENT_LENGTH, MAX_NAME_LENGTH = 2000, 255

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_US = 86_400_000_000
_ID = re.compile(r"[!-.0-~]{1,64}")
# What PostgreSQL takes for no text, and control characters.
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_TRUE, _FALSE = ("true", "yes", "1"), ("", "false", "no", "0")


class LabelProblem(NamedTuple):
    """An entry that gives no label: where it stands, whose it is (None: unknown), a reason and what was found.

    Reasons here: `cancelled`, `malformed`, `unknown_class`, `in_future`.

    Attributes:
        task: the id of its task in Label Studio; None where there is none.
    """

    place: str
    prediction_id: str | None
    reason: str
    detail: str
    task: int | None = None


class PlacedLabel(NamedTuple):
    """A label and where it stands in its file; `task` as in `LabelProblem`."""

    place: str
    label: NewLabel
    task: int | None = None


class LabelFile(NamedTuple):
    """What a file holds: labels, oldest first, and entries that give none."""

    labels: list[PlacedLabel]
    problems: list[LabelProblem]


class _RefusedError(ValueError):
    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read_label_studio(
    data: bytes, task: Classes, instance: str, labellers: Mapping[str, str], most: int | None = None
) -> LabelFile:
    """The annotations of a Label Studio export, JSON or JSON-MIN.

    An annotation is known by `<instance>/<its id>@<its time of change>`: edited, it is another label of its annotator.

    Args:
        instance: a name for the Label Studio, which numbers annotations; JSON-MIN names no project.
        labellers: names by annotator's number or email; others are called
            `<instance> user <number>`, or by their email.
        most: annotations that are read; None sets no bound.

    Raises:
        ValueError: not such an export, or one with more annotations than `most`.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {' '.join(str(error).split())}") from error
    labels, problems = [], []
    for count, given in enumerate(annotations(content)):
        if count == most:
            raise ValueError(f"more than {most} annotations")
        place, number = f"annotation {_shown(given.number)}", given.task if isinstance(given.task, int) else None
        try:
            labels.append(PlacedLabel(place, _of_annotation(given, task, instance, labellers), number))
        except _RefusedError as error:
            whose = given.prediction_id if isinstance(given.prediction_id, str) else None
            problems.append(LabelProblem(place, whose, error.reason, str(error), number))
    return _in_order(labels, problems)


def _of_annotation(given: Annotation, task: Classes, instance: str, labellers: Mapping[str, str]) -> NewLabel:
    if given.cancelled:
        raise _RefusedError("cancelled", "the annotator skipped the task")
    # Part of the label's name in the store, which has room for so many digits.
    if not isinstance(given.number, int) or not 0 <= given.number < 2**63:
        raise _RefusedError("malformed", f"id is {_shown(given.number)}; expected a number")
    choices = [given.choices] if isinstance(given.choices, str) else given.choices
    if not isinstance(choices, list) or len(choices) != 1:
        raise _RefusedError("malformed", f"{CLASS} is {_shown(given.choices)}; expected one choice")
    comment = given.comment
    if isinstance(comment, list) and all(isinstance(line, str) for line in comment):
        comment = "\n".join(comment)
    labelled_at, by = _time(given.updated_at, "updated_at"), given.completed_by
    if isinstance(by, int):
        by = labellers.get(str(by), f"{instance} user {by}")
    elif isinstance(by, str):
        by = labellers.get(by, by)
    return _label(
        task,
        prediction_id=given.prediction_id,
        label=choices[0],
        labeller=by,
        labelled_at=labelled_at,
        comment=comment,
        source=LABEL_STUDIO,
        external_id=f"{instance}/{given.number}@{labelled_at}",
    )


def read_csv_labels(data: bytes, task: Classes) -> LabelFile:
    """The rows of a CSV (UTF-8, comma) with `prediction_id, label, labeller, labelled_at` and, where wanted,
    `confidence, comment, adjudication`.

    A row is known by its content: the same row is stored once, from whichever file.

    Raises:
        ValueError: not such a file.
    """
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeError, csv.Error) as error:
        raise ValueError(f"not CSV in UTF-8: {error}") from error
    absent = [name for name in REQUIRED if name not in header]
    extra = [name for name in header if name not in (*REQUIRED, *OPTIONAL)]
    if absent or extra or len(set(header)) != len(header):
        raise ValueError(f"columns {header}; expected {list(REQUIRED)} and, where wanted, {list(OPTIONAL)}")
    labels, problems = [], []
    for line, row in rows:
        if not any(row):
            continue
        place, values = f"line {line}", dict(zip(header, (value.strip() for value in row), strict=False))
        try:
            if len(row) != len(header):
                raise _RefusedError("malformed", f"{len(row)} values; expected {len(header)}")
            labels.append(PlacedLabel(place, _of_row(values, task)))
        except _RefusedError as error:
            problems.append(LabelProblem(place, values.get("prediction_id"), error.reason, str(error)))
    return _in_order(labels, problems)


def _of_row(values: Mapping[str, str], task: Classes) -> NewLabel:
    confidence = values.get("confidence") or None
    settles = values.get("adjudication", "").lower()
    if settles not in (*_TRUE, *_FALSE):
        raise _RefusedError("malformed", f"adjudication is {settles!r}; expected true or false")
    try:
        confidence = None if confidence is None else float(confidence)
    except ValueError:
        confidence = -1.0
    if confidence is not None and not 0.0 <= confidence <= 1.0:
        raise _RefusedError("malformed", f"confidence is {values['confidence']!r}; expected 0 to 1")
    labelled_at = _time(values["labelled_at"], "labelled_at")
    content = [values.get(name, "") for name in ("prediction_id", "label", "labeller", "comment")]
    identity = json.dumps([*content, labelled_at, confidence, settles in _TRUE])
    return _label(
        task,
        prediction_id=values["prediction_id"],
        label=values["label"],
        labeller=values["labeller"],
        labelled_at=labelled_at,
        confidence=confidence,
        comment=values.get("comment"),
        adjudication=settles in _TRUE,
        source=CSV,
        external_id=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _label(task: Classes, prediction_id: Any, label: Any, labeller: Any, comment: Any, **values: Any) -> NewLabel:
    """Checks what no format checks."""
    if not isinstance(prediction_id, str) or not _ID.fullmatch(prediction_id):
        raise _RefusedError("malformed", f"prediction_id is {_shown(prediction_id)}; expected a prediction's id")
    if not isinstance(label, str) or label not in task.classes:
        expected = ", ".join(task.classes)
        raise _RefusedError("unknown_class", f"label is {_shown(label)}; expected one of {expected}")
    if values["labelled_at"] > now_us() + _DAY_US:
        raise _RefusedError("in_future", "labelled more than a day ahead of this machine's clock")
    return NewLabel(
        prediction_id=prediction_id,
        label=label,
        malignant=label in task.malignant,
        labeller=_text(labeller, "labeller", MAX_NAME_LENGTH),
        comment=_text(comment, "comment", MAX_COMMENT_LENGTH) if comment else None,
        **values,
    )


def _text(value: Any, name: str, max_length: int) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if not 0 < len(text) <= max_length or _NOT_TEXT.search(text):
        expected = f"text of 1 to {max_length} characters"
        raise _RefusedError("malformed", f"{name} is {_shown(value)}; expected {expected}")
    return text


def _time(value: Any, name: str) -> int:
    """ISO 8601, UTC without an offset, as microseconds."""
    try:
        moment = datetime.fromisoformat(value.strip() if isinstance(value, str) else "")
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        microseconds = (moment - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        microseconds = -1
    if microseconds < 0:
        raise _RefusedError("malformed", f"{name} is {_shown(value)}; expected an ISO 8601 time from 1970 on")
    return microseconds


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _in_order(labels: list[PlacedLabel], problems: list[LabelProblem]) -> LabelFile:
    # So that a labeller's later label supersedes the earlier one, whatever the order in the file.
    return LabelFile(sorted(labels, key=lambda item: item.label.labelled_at or 0), problems)
