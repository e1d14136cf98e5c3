"""A window of the prediction log, or a reference, as compact columns: 4 bytes a figure, 128 an embedding.

A day of a million predictions with 40 columns takes 0.4 GB this way; as rows of dictionaries it took over 10 GB.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modeling.schema import CONTEXTS, TaskSpec
from monitoring.drift_statistics import Feature
from monitoring.prediction_log import EMBEDDING_DIM, EMBEDDING_NAMES, QUALITY_NAMES
from store.database import Store
from store.prediction_windows import prediction_pages

if TYPE_CHECKING:
    import pandas as pd

PLACES = ("institution", "device")
ABSTENTION, ANSWERED = "abstention", "answered"
# A request's clock may run ahead of the service's by this much.
CLOCK_TOLERANCE_US = 300 * 1_000_000
_MISSING, _OTHER = "(missing)", "(other)"
# What more distinct values than this are called: free text in a column of categories would fill the memory.
_MAX_CATEGORIES = 1_000
_MAX_NAME = 100
_READ = (
    *("patient_hmac", "id", "received_at", "acquired_at", "model_version", "context", "metadata", "image_score"),
    *("risk", "band", "abstained", "reasons", *PLACES, "embedding", *QUALITY_NAMES),
)
_NO_EMBEDDING = np.full(EMBEDDING_DIM, np.nan, "<f2").tobytes()


class Coded(NamedTuple):
    """A column of categories: int codes (N,), -1 without a value, and what they stand for."""

    codes: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Rows as columns of N.

    Attributes:
        groups: int; equal for rows of one patient, a row without a patient is one of its own.
        numbers: name to float32 with NaN; categories: name to codes.
        asked: bool; whether the request had metadata, whose absence else says nothing.
        embeddings: float (N, 64) with NaN rows; None in a reference without images.
        places: codes of institution and device, where known.
        period: int; for trailing rows the number of the day, counted back from the window.
    """

    groups: np.ndarray
    numbers: dict[str, np.ndarray]
    categories: dict[str, Coded]
    asked: np.ndarray
    embeddings: np.ndarray | None
    places: dict[str, Coded] = field(default_factory=dict)
    period: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def num_groups(self) -> int:
        return len(np.unique(self.groups))

    def take(self, rows: np.ndarray) -> Columns:
        """The rows chosen by bool (N,) or int (M,)."""

        def chosen(coded: Mapping[str, Coded]) -> dict[str, Coded]:
            return {name: Coded(column.codes[rows], column.names) for name, column in coded.items()}

        return Columns(
            self.groups[rows],
            {name: values[rows] for name, values in self.numbers.items()},
            chosen(self.categories),
            self.asked[rows],
            None if self.embeddings is None else self.embeddings[rows],
            chosen(self.places),
            None if self.period is None else self.period[rows],
        )


@dataclass(frozen=True)
class LogWindow:
    """One model's rows of a window.

    Attributes:
        rows_by_model: rows of every model, by version.
        acquired_after_received: rows whose `acquired_at` is later than their `received_at` by over five minutes.
    """

    columns: Columns
    rows_by_model: dict[str, int]
    acquired_after_received: int


def read_columns(
    store: Store,
    task: TaskSpec,
    start_us: int,
    end_us: int,
    model_version: str | None = None,
    progress: Callable[[int], None] | None = None,
    expected_rows: int = 0,
) -> LogWindow:
    """Streams the rows with start_us <= received_at < end_us of a model (None: of any) into columns.

    Args:
        progress: told after each page how many rows were read.
        expected_rows: memory for so many is taken at once.
    """
    reader = _Reader(task, model_version, expected_rows)
    for page in prediction_pages(store, _READ, start_us, end_us):
        reader.add(page)
        if progress is not None:
            progress(sum(reader.rows_by_model.values()))
    return reader.window()


def read_trailing(
    store: Store, task: TaskSpec, start_us: int, days: int, max_rows: int, model_version: str | None = None
) -> Columns:
    """A bounded sample of a model's rows of the days before `start_us`, of every hour its first ones.

    Lesions of one patient are received together, so an hour's first rows are mostly whole visits.
    """
    hour = 3_600 * 1_000_000
    reader = _Reader(task, model_version, 0, start_us)
    per_hour = max(1, max_rows // (24 * days))
    for number in range(24 * days, 0, -1):
        begin = start_us - number * hour
        for page in prediction_pages(store, _READ, begin, begin + hour, per_hour):
            reader.add(page)
    return reader.window().columns


def columns_of_rows(rows: Iterable[Mapping[str, Any]], task: TaskSpec, model_version: str | None = None) -> LogWindow:
    """As `read_columns`, of rows at hand (`PredictionRecord.to_row`)."""
    reader = _Reader(task, model_version, 0)
    page = [tuple(row[name] for name in _READ) for row in rows]
    if page:
        reader.add(page)
    return reader.window()


def reference_columns(table: pd.DataFrame, task: TaskSpec) -> Columns:
    """A bundle's `reference()`; columns that it lacks are left out and judged by no one.

    Raises:
        ValueError: it names no patients.
    """
    if "group" not in table:
        raise ValueError(f"the bundle's reference has no column 'group'; it has {', '.join(map(str, table.columns))}")
    numeric = [name for name, spec in task.columns.items() if spec.kind != "categorical"]
    names = ["image_score", *(f"risk_{context}" for context in CONTEXTS), *QUALITY_NAMES, *numeric]
    coded = [*(f"band_{context}" for context in CONTEXTS), ABSTENTION]
    categories = {name: _code(table[name], None) for name in coded if name in table}
    for name, spec in task.columns.items():
        if spec.kind == "categorical" and name in table:
            categories[name] = _code(table[name], _MISSING)
    embeddings = [name for name in EMBEDDING_NAMES if name in table]
    return Columns(
        np.unique(table["group"].to_numpy(), return_inverse=True)[1].astype(np.int32),
        {name: floats(table[name]) for name in names if name in table},
        categories,
        np.ones(len(table), bool),
        table[embeddings].to_numpy(np.float32) if embeddings else None,
        {name: _code(table[name], None) for name in PLACES if name in table and name not in task.columns},
    )


def drift_features(reference: Columns, current: Columns, task: TaskSpec) -> list[Feature]:
    """The columns to compare: scores, bands, abstention, image quality, metadata, and whether metadata is missing.

    Risks are compared per context, since a risk from the image alone is distributed otherwise.
    """
    order = [
        "image_score",
        *(f"{what}_{context}" for context in CONTEXTS for what in ("risk", "band")),
        ABSTENTION,
        *QUALITY_NAMES,
        *(task.columns if current.asked.any() else ()),
    ]
    features = []
    for name in order:
        if name in reference.numbers and name in current.numbers:
            features.append(Feature(name, "numeric", reference.numbers[name], current.numbers[name]))
            if name in task.columns:
                features += _presence(name, reference, current)
        elif name in reference.categories and name in current.categories:
            features.append(coded_feature(name, reference.categories[name], current.categories[name]))
    return features


def coded_feature(name: str, reference: Coded, current: Coded) -> Feature:
    """One categorical feature of two columns that have names of their own."""
    names = tuple(dict.fromkeys([*reference.names, *current.names]))
    place = {value: index for index, value in enumerate(names)}
    sides = []
    for side in (reference, current):
        # The last entry is what -1 points at.
        lookup = np.array([*(place[value] for value in side.names), -1], np.int32)
        sides.append(lookup[side.codes])
    return Feature(name, "categorical", *sides, names)


def _presence(name: str, reference: Columns, current: Columns) -> list[Feature]:
    missing = [np.isnan(side.numbers[name]) for side in (reference, current)]
    if not (missing[0].any() or missing[1][current.asked].any()):
        return []
    sides = [
        np.where(side.asked, lost, -1).astype(np.int8) for side, lost in zip((reference, current), missing, strict=True)
    ]
    return [Feature(f"{name} missing", "categorical", *sides, ("present", "missing"))]


def floats(values: Any) -> np.ndarray:
    """Float32 (N,): what is no finite number is NaN."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = None
    # Lists of one length are an array too, of two dimensions.
    if numbers is None or numbers.ndim != 1:
        numbers = np.array([_float(value) for value in values], dtype=np.float64)
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def _float(value: Any) -> float:
    try:
        return np.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _code(values: Iterable[Any], missing: str | None) -> Coded:
    import pandas as pd

    codes = _Codes(missing)
    return Coded(codes.of([None if pd.isna(value) else value for value in values]), codes.names)


class _Codes:
    """Numbers for categories in the order in which they come."""

    def __init__(self, missing: str | None = None):
        self._missing = missing
        self._known: dict[str, int] = {}
        # By the raw value: saves a str() per row.
        self._raw: dict[Any, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._known)

    def of(self, values: Sequence[Any]) -> np.ndarray:
        """Int32 codes of values, None being -1 or the category of the missing."""
        raw = self._raw
        try:
            found = [raw.get(value) for value in values]
        except TypeError:
            found = [None] * len(values)
        return np.array(
            [self._new(value) if code is None else code for code, value in zip(found, values, strict=True)], np.int32
        )

    def _new(self, value: Any) -> int:
        if value is None:
            return -1 if self._missing is None else self._known.setdefault(self._missing, len(self._known))
        name = str(value)[:_MAX_NAME]
        if name not in self._known and len(self._known) >= _MAX_CATEGORIES:
            name = _OTHER
        code = self._known.setdefault(name, len(self._known))
        # Not 1, True and 1.0, which are one key and three names.
        if isinstance(value, str) and name != _OTHER:
            self._raw[value] = code
        return code


class _Growing:
    """An array that rows are added to without keeping the parts."""

    def __init__(self, dtype: Any, expected_rows: int, width: int | None = None):
        self._width = () if width is None else (width,)
        self._values = np.empty((max(expected_rows, 1), *self._width), dtype)
        self._num = 0

    def add(self, values: np.ndarray) -> None:
        end = self._num + len(values)
        if end > len(self._values):
            larger = np.empty((max(end, len(self._values) * 3 // 2), *self._width), self._values.dtype)
            larger[: self._num] = self._values[: self._num]
            self._values = larger
        self._values[self._num : end] = values
        self._num = end

    def array(self) -> np.ndarray:
        return self._values[: self._num]


class _Reader:
    """Takes pages of rows apart."""

    def __init__(self, task: TaskSpec, model_version: str | None, expected_rows: int, before_us: int | None = None):
        self.rows_by_model: Counter[str] = Counter()
        self.acquired_after_received = 0
        self._task, self._model_version, self._before_us = task, model_version, before_us
        numeric = [name for name, spec in task.columns.items() if spec.kind != "categorical"]
        figures = ["image_score", "risk", *QUALITY_NAMES]
        self._figures = {name: _Growing(np.float32, expected_rows) for name in figures}
        self._numeric = {name: _Growing(np.float32, expected_rows) for name in numeric}
        self._coders = {name: _Codes(_MISSING) for name in task.columns if name not in self._numeric}
        self._coders_of_rows = {name: _Codes() for name in ("context", "band", ABSTENTION, *PLACES)}
        self._codes = {name: _Growing(np.int32, expected_rows) for name in self._coders}
        self._codes_of_rows = {name: _Growing(np.int16, expected_rows) for name in self._coders_of_rows}
        self._groups = _Growing(np.uint64, expected_rows)
        self._periods = _Growing(np.int32, expected_rows if before_us is not None else 0)
        self._embeddings = _Growing(np.float16, expected_rows, EMBEDDING_DIM)

    def add(self, page: Sequence[Sequence[Any]]) -> None:
        version = _READ.index("model_version")
        self.rows_by_model.update(row[version] for row in page)
        if self._model_version is not None:
            page = [row for row in page if row[version] == self._model_version]
        if not page:
            return
        values = dict(zip(_READ, zip(*page, strict=True), strict=True))
        self._groups.add(np.array(list(map(_group, values["patient_hmac"], values["id"])), np.uint64))
        for name, column in self._figures.items():
            column.add(floats(values[name]))
        records = values["metadata"]
        for name, column in self._numeric.items():
            column.add(floats([record.get(name) for record in records]))
        for name, coder in self._coders.items():
            self._codes[name].add(coder.of([record.get(name) for record in records]))
        abstained = [
            "+".join(sorted(set(reasons))) or "abstained" if refused else ANSWERED
            for refused, reasons in zip(values["abstained"], values["reasons"], strict=True)
        ]
        for name, coder in self._coders_of_rows.items():
            self._codes_of_rows[name].add(coder.of(abstained if name == ABSTENTION else values[name]))
        data = b"".join(
            [
                blob if blob is not None and len(blob) == len(_NO_EMBEDDING) else _NO_EMBEDDING
                for blob in values["embedding"]
            ]
        )
        self._embeddings.add(np.frombuffer(data, "<f2").reshape(len(page), EMBEDDING_DIM))
        received = np.array(values["received_at"], np.int64)
        acquired = np.array([-1 if moment is None else moment for moment in values["acquired_at"]], np.int64)
        self.acquired_after_received += int((acquired > received + CLOCK_TOLERANCE_US).sum())
        if self._before_us is not None:
            self._periods.add((self._before_us - 1 - received) // (86_400 * 1_000_000))

    def window(self) -> LogWindow:
        rows = {
            name: Coded(column.array(), self._coders_of_rows[name].names)
            for name, column in self._codes_of_rows.items()
        }
        context = rows["context"]
        numbers = {name: column.array() for name, column in self._figures.items() if name != "risk"}
        categories = {ABSTENTION: rows[ABSTENTION]}
        for code, name in enumerate(context.names):
            chosen = context.codes == code
            numbers[f"risk_{name}"] = np.where(chosen, self._figures["risk"].array(), np.float32(np.nan))
            categories[f"band_{name}"] = Coded(np.where(chosen, rows["band"].codes, -1), rows["band"].names)
        asked = np.ones(len(context.codes), bool)
        if "image_only" in context.names:
            asked = context.codes != context.names.index("image_only")
        for name, column in self._numeric.items():
            values = column.array()
            values[~asked] = np.nan
            numbers[name] = values
        for name, column in self._codes.items():
            codes = column.array()
            codes[~asked] = -1
            categories[name] = Coded(codes, self._coders[name].names)
        columns = Columns(
            np.unique(self._groups.array(), return_inverse=True)[1].astype(np.int32),
            numbers,
            categories,
            asked,
            self._embeddings.array(),
            {name: rows[name] for name in PLACES},
            self._periods.array() if self._before_us is not None else None,
        )
        return LogWindow(columns, dict(self.rows_by_model), self.acquired_after_received)


def _group(patient: str | None, row_id: str) -> int:
    """64 bits of a patient's pseudonym, or of a row that has none: a million collide with a chance of 3e-8."""
    return int(patient[:16], 16) if patient else int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big")
