"""The prediction log as Parquet: the columns of an export, written and filtered in row groups of a fixed size.

Equal rows give equal bytes: rows are in order of (role, received_at, id), JSON keys and maps are sorted, and a row
group ends after as many rows however the rows arrive. A filtered file is the one that the rest would have given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sql

from monitoring.prediction_log import EMBEDDING_DIM
from store.database import Store
from store.replaced_file import HashedSink
from store.tables import labels, predictions

# About 12 MB as Arrow; Parquet readers skip whole groups by role and time.
ROW_GROUP_ROWS = 20_000
# Rows turned from Python objects into Arrow at a time: these take ten times the memory.
_PAGE_ROWS = 2_000
# Ids per statement, below the fewest parameters that either database takes.
_IDS = 500

_TIME = pa.timestamp("us", tz="UTC")
LABEL = pa.struct(
    [
        ("id", pa.int64()),
        ("label", pa.string()),
        ("malignant", pa.bool_()),
        ("labeller", pa.string()),
        ("labelled_at", _TIME),
        ("confidence", pa.float64()),
        ("comment", pa.string()),
        ("supersedes", pa.int64()),
        ("source", pa.string()),
        ("adjudication", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("role", pa.string()),
        ("received_at", _TIME),
        ("acquired_at", _TIME),
        ("caller", pa.string()),
        ("patient_hmac", pa.string()),
        ("institution", pa.string()),
        ("device", pa.string()),
        ("image_hash", pa.string()),
        ("model_version", pa.string()),
        ("context", pa.string()),
        ("metadata", pa.string()),
        ("image_score", pa.float64()),
        ("class_probabilities", pa.map_(pa.string(), pa.float64())),
        ("risk", pa.float64()),
        ("band", pa.string()),
        ("threshold", pa.float64()),
        ("abstained", pa.bool_()),
        ("reasons", pa.list_(pa.string())),
        *((name, pa.float64()) for name in ("brightness", "contrast", "blur", "red", "green", "blue")),
        # Not a list of fixed size: pyarrow does not read back one that is missing.
        ("embedding", pa.list_(pa.float32())),
        ("stage_ms", pa.map_(pa.string(), pa.float64())),
        ("labels", pa.list_(LABEL)),
    ]
)


class PredictionParquet:
    """Writes tables of `SCHEMA` to a file in row groups of `ROW_GROUP_ROWS`; a context manager that ends the file.

    Attributes:
        num_rows: rows written so far.
    """

    def __init__(self, sink: HashedSink):
        self._writer = pq.ParquetWriter(sink, SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self.num_rows = 0

    def __enter__(self) -> PredictionParquet:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_waiting:
            self._write(pa.concat_tables(self._waiting))
        self._writer.close()

    def append(self, table: pa.Table) -> None:
        """Adds rows behind those before."""
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        self.num_rows += table.num_rows
        if self._num_waiting < ROW_GROUP_ROWS:
            return
        rows = pa.concat_tables(self._waiting)
        while rows.num_rows >= ROW_GROUP_ROWS:
            self._write(rows.slice(0, ROW_GROUP_ROWS))
            rows = rows.slice(ROW_GROUP_ROWS)
        self._waiting, self._num_waiting = [rows], rows.num_rows

    def _write(self, rows: pa.Table) -> None:
        # Pages end where chunks end: the same rows in other chunks would be other bytes.
        self._writer.write_table(rows.combine_chunks(), row_group_size=ROW_GROUP_ROWS)


def export_tables(store: Store, start_us: int, end_us: int, roles: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of `SCHEMA`, of at most 2,000 rows, with start_us <= received_at < end_us: role by role, each by
    (received_at, id), with all labels of each row, oldest first."""
    for role in roles:
        rows = store.predictions_between(start_us, end_us, role)
        while page := list(islice(rows, _PAGE_ROWS)):
            yield export_table(page, _labels_of(store, [row["id"] for row in page]))


def count_rows(store: Store, start_us: int, end_us: int, roles: Sequence[str]) -> int:
    """How many rows `export_tables` is going to give, about."""
    table = predictions.c
    query = sql.select(sql.func.count()).where(
        table.role.in_(roles), table.received_at >= start_us, table.received_at < end_us
    )
    with store.reading() as connection:
        return connection.execute(query).scalar_one()


def export_table(rows: Sequence[dict[str, Any]], labels_of: dict[str, list[dict[str, Any]]]) -> pa.Table:
    """Rows of `predictions` as a table of `SCHEMA`.

    Args:
        labels_of: rows of `labels`, oldest first, by prediction id.
    """
    columns: dict[str, Any] = {}
    for field in SCHEMA:
        if field.name == "embedding":
            columns[field.name] = _embeddings([row["embedding"] for row in rows])
            continue
        if field.name == "labels":
            values: list[Any] = [labels_of.get(row["id"], []) for row in rows]
        else:
            values = [row[field.name] for row in rows]
        if field.name == "metadata":
            values = [json.dumps(value, sort_keys=True) for value in values]
        elif pa.types.is_map(field.type):
            values = [None if value is None else sorted(value.items()) for value in values]
        columns[field.name] = pa.array(values, field.type)
    return pa.table(columns, SCHEMA)


def _embeddings(values: Sequence[bytes | None]) -> pa.Array:
    """Each as 64 float32, or null."""
    sizes = [0 if value is None else EMBEDDING_DIM for value in values]
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    stored = np.frombuffer(b"".join(value for value in values if value is not None), "<f2")
    missing = pa.array([value is None for value in values], pa.bool_())
    # Not every reader of Parquet knows float16.
    return pa.ListArray.from_arrays(offsets, pa.array(stored.astype(np.float32)), mask=missing)


def _labels_of(store: Store, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    columns = [labels.c[field.name] for field in LABEL]
    found: dict[str, list[dict[str, Any]]] = {}
    with store.reading() as connection:
        for start in range(0, len(ids), _IDS):
            query = (
                sql.select(labels.c.prediction_id, *columns)
                .where(labels.c.prediction_id.in_(ids[start : start + _IDS]))
                .order_by(labels.c.id)
            )
            for row in connection.execute(query).mappings():
                found.setdefault(row["prediction_id"], []).append({field.name: row[field.name] for field in LABEL})
    return found


def holds_patients(file: IO[bytes], patients: Collection[str]) -> bool:
    """Whether an export has rows of any of these pseudonyms; reads one column, row group by row group.

    Raises:
        ValueError: not an export.
    """
    wanted = pa.array(sorted(patients), pa.string())
    with _opened(file) as parquet:
        for group in range(parquet.num_row_groups):
            column = parquet.read_row_group(group, columns=["patient_hmac"])["patient_hmac"]
            if pc.any(pc.is_in(column, value_set=wanted)).as_py():
                return True
    return False


def count_file_rows(file: IO[bytes]) -> int:
    """How many rows an export holds.

    Raises:
        ValueError: not an export.
    """
    with _opened(file) as parquet:
        return parquet.metadata.num_rows


def without_patients(file: IO[bytes], patients: Collection[str]) -> Iterable[tuple[pa.Table, int]]:
    """The tables of an export without the rows of these pseudonyms, and how many rows each has lost.

    Raises:
        ValueError: not an export.
    """
    gone = pa.array(sorted(patients), pa.string())
    with _opened(file) as parquet:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group).cast(SCHEMA)
            kept = table.filter(pc.invert(pc.is_in(table["patient_hmac"], value_set=gone)))
            yield kept, table.num_rows - kept.num_rows


def _opened(file: IO[bytes]) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected a Parquet file: {' '.join(str(error).split())}") from error
    if "patient_hmac" not in parquet.schema_arrow.names:
        raise ValueError("expected an export of predictions, with a column patient_hmac")
    return parquet
