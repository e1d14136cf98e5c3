"""Reads a metadata CSV against a task: a broken file is an error, a broken row is quarantined with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from modeling.schema import ColumnSpec, TaskSpec

# Columns that a prepared table adds; a feature of the same name would overwrite them.
RESERVED_COLUMNS = ("id", "group", "context", "label", "fold", "offset", "size", "perceptual_hash", "added")


class QuarantinedRow(NamedTuple):
    """A row that is left out: its image id ("" when that is what is missing), a reason, and what was found."""

    id: str
    reason: str
    detail: str


def read_metadata(path: str | Path, task: TaskSpec, require_labels: bool) -> tuple[pd.DataFrame, list[QuarantinedRow]]:
    """Reads and validates a metadata CSV (UTF-8, comma, empty = missing).

    Args:
        path: the CSV.
        task: which columns there must be and what they may hold. Other columns are ignored.
        require_labels: True for training. False for scoring: labels are not read, and the fold group, institution and
            subgroup columns may be absent.

    Returns:
        The usable rows in file order: id str, group str, context str ("" = none), label int64 (only with
        `require_labels`), then the task's columns (numeric float64, categorical str; missing = NaN) and, where present,
        institution and subgroup columns. And the quarantined rows, each with one reason: `id_missing`, `duplicate_id`,
        `group_missing`, `label_missing`, `label_unknown`, `not_a_number`, `out_of_range`, `category_unknown`.

    Raises:
        ValueError: missing, unreadable or empty file, or columns that the task needs are not there.
    """
    raw = _read_csv(Path(path), task, require_labels)
    table = pd.DataFrame({"id": raw[task.id_column].fillna("")}, index=raw.index)
    # A table to be scored may come without the fold group: nothing is split, so each row is its own group.
    table["group"] = raw[task.fold_group if task.fold_group in raw else task.id_column]
    table["context"] = raw[task.context_group].fillna("") if task.context_group else ""

    problems = _Problems(table["id"])
    problems.add(raw[task.id_column].isna(), "id_missing", (f"row {row + 1} has no id" for row in raw.index))
    problems.add(_ambiguous_ids(raw, task), "duplicate_id", "the id occurs more than once")
    if require_labels:
        problems.add(table["group"].isna(), "group_missing", f"{task.fold_group} is empty")
        table["label"] = _labels(raw, task, problems)
    for name, spec in task.columns.items():
        check = _numeric if spec.kind == "numeric" else _categorical
        table[name] = check(name, raw[name], spec, problems)
    for name in _report_columns(task):
        if name in raw and name not in table:
            table[name] = raw[name]
    good = ~problems.bad
    return table[good].reset_index(drop=True), problems.rows()


class _Problems:
    """Collects the first problem of each row."""

    def __init__(self, ids: pd.Series):
        self._ids = ids.to_numpy()
        self.bad = np.zeros(len(ids), bool)
        self._found: dict[int, tuple[str, str]] = {}

    def add(self, mask: pd.Series, reason: str, detail: str | Iterable[str]) -> None:
        rows = np.flatnonzero(mask.to_numpy(bool) & ~self.bad)
        if not len(rows):
            return
        details = None if isinstance(detail, str) else list(detail)
        for row in rows:
            self._found[int(row)] = (reason, detail if details is None else details[row])
        self.bad[rows] = True

    def rows(self) -> list[QuarantinedRow]:
        return [QuarantinedRow(str(self._ids[row]), *self._found[row]) for row in sorted(self._found)]


def _report_columns(task: TaskSpec) -> list[str]:
    names = [*task.subgroup_columns]
    if task.institution_column is not None:
        names.append(task.institution_column)
    return names


def _read_csv(path: Path, task: TaskSpec, require_labels: bool) -> pd.DataFrame:
    clash = sorted(set(RESERVED_COLUMNS) & {*task.columns, *_report_columns(task)})
    if clash:
        raise ValueError(f"task {task.name}: columns {clash} are names that the prepared table uses; rename them")
    if not path.exists():
        raise ValueError(f"metadata file {path} does not exist; expected a CSV with a header")
    labels = [task.label_column] if task.label_column is not None else list(task.label_columns or [])
    required = [task.id_column, *([task.context_group] if task.context_group else [])]
    optional = [task.fold_group, *_report_columns(task)]
    if require_labels:
        required += [*optional, *labels]
    required += task.columns
    wanted = {*required, *optional}
    # Ids, groups, labels and categories stay the text they are: "007" is not 7.
    text = {name: "str" for name in wanted - set(task.numeric_columns)}
    # All columns are read, because only then are rows with too many fields noticed: an unquoted comma shifts the
    # values after it, and usecols or an implicit index would take the shifted ones.
    options = {"encoding": "utf-8", "low_memory": False, "index_col": False, "float_precision": "round_trip"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            header = list(pd.read_csv(path, nrows=0, **options).columns)
            absent = [name for name in dict.fromkeys(required) if name not in header]
            if absent:
                raise ValueError(f"metadata file {path} lacks columns {absent}; task {task.name} expects them")
            raw = pd.read_csv(path, dtype=text, **options)[[name for name in header if name in wanted]]
    except (OSError, UnicodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"metadata file {path} cannot be read as CSV: {' '.join(str(error).split())}") from error
    except pd.errors.ParserWarning as error:
        raise ValueError(f"metadata file {path} has rows with more fields than its header") from error
    if raw.empty:
        raise ValueError(f"metadata file {path} has a header but no rows")
    return raw


def _ambiguous_ids(raw: pd.DataFrame, task: TaskSpec) -> pd.Series:
    """True for repeats of an identical row, and for all rows of an id whose rows differ: nobody knows which holds."""
    ids = raw[task.id_column]
    repeated = ids.duplicated(keep=False) & ids.notna()
    if not repeated.any():
        return repeated
    distinct = raw[repeated].drop_duplicates()[task.id_column].value_counts()
    conflicting = set(distinct[distinct > 1].index)
    return repeated & (ids.isin(conflicting) | ids.duplicated(keep="first"))


def _labels(raw: pd.DataFrame, task: TaskSpec, problems: _Problems) -> pd.Series:
    """Class indices int64; -1 where a problem was noted."""
    if task.label_column is None:
        assert task.label_columns is not None
        hot = raw[task.label_columns].apply(pd.to_numeric, errors="coerce")
        count = (hot == 1).sum(axis=1)
        problems.add(hot.isna().any(axis=1) | (hot == 0).all(axis=1), "label_missing", "no class column is 1")
        problems.add((count != 1) | ~hot.isin([0, 1]).all(axis=1), "label_unknown", "not one 1 among 0s")
        return pd.Series(np.where(count == 1, (hot == 1).to_numpy().argmax(axis=1), -1), raw.index, dtype=np.int64)
    values = raw[task.label_column].str.strip()
    # A column with gaps is often written as 1.0 instead of 1.
    values = values.str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    known = {value: index for index, value in enumerate(task.label_values or task.classes)}
    label = values.map(known)
    problems.add(values.isna() | (values == ""), "label_missing", f"{task.label_column} is empty")
    problems.add(
        label.isna(), "label_unknown", (f"{task.label_column} = {value!r}; expected {list(known)}" for value in values)
    )
    return label.fillna(-1).astype(np.int64)


def _numeric(name: str, values: pd.Series, spec: ColumnSpec, problems: _Problems) -> pd.Series:
    number = pd.to_numeric(values, errors="coerce").astype(np.float64)
    problems.add(number.isna() & values.notna(), "not_a_number", (f"{name} = {value!r}" for value in values))
    low = -np.inf if spec.minimum is None else spec.minimum
    high = np.inf if spec.maximum is None else spec.maximum
    outside = (number < low) | (number > high) | np.isinf(number)
    problems.add(outside, "out_of_range", (f"{name} = {value:g}; expected {low:g} to {high:g}" for value in number))
    return number


def _categorical(name: str, values: pd.Series, spec: ColumnSpec, problems: _Problems) -> pd.Series:
    if spec.categories is not None:
        unseen = values.notna() & ~values.isin(spec.categories)
        problems.add(
            unseen, "category_unknown", (f"{name} = {value!r}; expected {spec.categories}" for value in values)
        )
    return values
