"""Opens the store and holds every write to it: one transaction per call, safe to repeat.

Several processes share one SQLite file (WAL, one writer at a time); PostgreSQL is chosen by URL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from store import audit_chain
from store.alarm_topics import insert_alarm
from store.connection import ADVISORY_LOCK, connect, connect_as_found
from store.erased_patients import ROWS_ERASED, audit_subject, find_late, keep_erasures_out
from store.errors import StoreUnavailableError as StoreUnavailableError
from store.shadow_records import is_shadow_id, with_champions
from store.tables import DRIFT_KEY, alarms, approvals, audit, drift_reports, images, labels, now_us, predictions

_PAGE_ROWS = 2_000
LOG_WRITER = "prediction log"
"""Who keeps late rows out, in the audit trail."""


class Inserted(NamedTuple):
    """What became of prediction rows.

    Attributes:
        num_new: rows that were not stored before.
        late: places of the rows that were left out, because their patient was erased after they were received.
    """

    num_new: int
    late: frozenset[int] = frozenset()


def open_store(url: str, create: bool = True, upgrade: bool = False) -> Store:
    """Opens the store at a SQLAlchemy URL, making folder, file and schema where there are none.

    Args:
        create: False for readers, to whom a mistyped path must not be an empty store.
        upgrade: bring a store of an older release up to date, all or nothing; replicas of that release which start
            later cannot open it any more.

    Raises:
        ValueError: not a store, a store of a later release, one of an older release without `upgrade`, or none there
            with `create=False`.
        StoreUnavailableError: the database does not answer, or not in time.
    """
    with _openable(url):
        return Store(connect(url, create, upgrade))


def look_at_store(url: str) -> tuple[Store, int] | None:
    """The store at a SQLAlchemy URL as it is, to be read only, and its schema version, which may be an older release's;
    None where none was made yet. Nothing is made or brought up to date.

    Raises:
        ValueError, StoreUnavailableError: as `open_store`.
    """
    with _openable(url):
        found = connect_as_found(url)
    return None if found is None else (Store(found[0]), found[1])


@contextmanager
def _openable(url: str) -> Iterator[None]:
    try:
        yield
    except exc.DBAPIError as error:
        raise StoreUnavailableError(f"store {url.rpartition('@')[2]} cannot be opened: {error.orig}") from error


def _row(mapping: sql.RowMapping) -> dict[str, Any]:
    return dict(mapping)


class Store:
    """Reads and writes of one database. Thread-safe; open one per process with `open_store`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        # Writers take SQLite's lock at BEGIN: a transaction that turns from reading to writing fails at once
        # with SQLITE_BUSY, whatever the busy timeout, when another process wrote in between.
        self._writer = engine.execution_options(dermray_write=True)
        dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
        self._insert = dialect.insert

    @property
    def url(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Closes the connections; the store may be used again after."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for SELECTs.

        Raises:
            StoreUnavailableError: the database does not answer.
        """
        try:
            with self.engine.connect() as connection:
                yield connection
        except exc.DBAPIError as error:
            raise StoreUnavailableError(f"store {self.url} cannot be read: {error.orig}") from error
        except exc.TimeoutError as error:
            raise StoreUnavailableError(f"store {self.url} cannot be read: every connection is in use") from error

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One write transaction: committed and on disk when the block ends, rolled back when it raises.

        Raises:
            ValueError: a row breaks the schema; it will never be taken.
            StoreUnavailableError: locked beyond the busy timeout, disk full, or the database is gone.
        """
        try:
            with self._writer.begin() as connection:
                yield connection
        except (exc.IntegrityError, exc.DataError) as error:
            raise ValueError(f"the store refuses a row: {error.orig}") from error
        except exc.DBAPIError as error:
            raise StoreUnavailableError(f"store {self.url} took no write: {error.orig}") from error
        except exc.TimeoutError as error:
            raise StoreUnavailableError(f"store {self.url} took no write: every connection is in use") from error
        except exc.StatementError as error:
            raise ValueError(f"the store refuses a row: {error.orig}") from error

    # Predictions

    def insert_predictions(self, rows: Sequence[dict[str, Any]], image_rows: Sequence[dict[str, Any]] = ()) -> Inserted:
        """Writes prediction rows, and rows of their images, in one transaction.

        A row whose id, or whose (caller, idempotency_key), is already stored is left as it was. A late one (see
        `erased_patients`) is not written, nor the row of a picture that only late ones use; an audit entry lists these
        pictures, whose files are the caller's to remove. A shadow's row whose champion's is not stored is left out.
        """
        with self.writing() as connection:
            if any(row.get("patient_hmac") is not None for row in rows):
                keep_erasures_out(connection)
            late = find_late(connection, rows)
            taken = [row for place, row in enumerate(rows) if place not in late]
            if late:
                refused = [rows[place] for place in sorted(late)]
                unused = {row.get("image_hash") for row in refused} - {row.get("image_hash") for row in taken}
                image_rows = [row for row in image_rows if row["hash"] not in unused]
                self._audit_late(connection, refused, unused)
            if image_rows:
                connection.execute(self._insert(images).on_conflict_do_nothing(), list(image_rows))
            num_new = self._insert_rows(connection, [row for row in taken if not is_shadow_id(row["id"])])
            shadows = [row for row in taken if is_shadow_id(row["id"])]
            if shadows:
                num_new += self._insert_rows(connection, with_champions(connection, shadows))
            return Inserted(num_new, late)

    def _insert_rows(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
        if not rows:
            return 0
        # One statement for all rows needs all columns in each of them.
        complete = [{**dict.fromkeys(predictions.c.keys()), **row} for row in rows]
        return connection.execute(self._insert(predictions).on_conflict_do_nothing(), complete).rowcount

    def _audit_late(self, connection: Connection, rows: Sequence[Mapping[str, Any]], unused: set[str | None]) -> None:
        for patient_hmac, count in Counter(row["patient_hmac"] for row in rows).items():
            theirs = {row.get("image_hash") for row in rows if row["patient_hmac"] == patient_hmac} & unused
            detail = {"counts": {"late": count}, "image_hashes": sorted(filter(None, theirs))}
            self._append_audit(connection, LOG_WRITER, ROWS_ERASED, audit_subject(patient_hmac), detail)

    def find_prediction(self, prediction_id: str) -> dict[str, Any] | None:
        """The prediction row with this id, or None."""
        with self.reading() as connection:
            found = connection.execute(sql.select(predictions).where(predictions.c.id == prediction_id)).mappings()
            return next(map(_row, found), None)

    def find_by_idempotency_key(self, caller: str, key: str) -> dict[str, Any] | None:
        """The prediction row this caller stored under this idempotency key, or None."""
        query = sql.select(predictions).where(predictions.c.caller == caller, predictions.c.idempotency_key == key)
        with self.reading() as connection:
            return next(map(_row, connection.execute(query).mappings()), None)

    def predictions_between(self, start_us: int, end_us: int, role: str = "champion") -> Iterator[dict[str, Any]]:
        """Prediction rows with start_us <= received_at < end_us, by (received_at, id), read page by page."""
        table = predictions.c
        after: tuple[int, str] = (start_us, "")
        while True:
            query = (
                sql.select(predictions)
                .where(table.role == role, table.received_at >= after[0], table.received_at < end_us)
                .where(sql.or_(table.received_at > after[0], table.id > after[1]))
                .order_by(table.received_at, table.id)
                .limit(_PAGE_ROWS)
            )
            with self.reading() as connection:
                page = [_row(row) for row in connection.execute(query).mappings()]
            yield from page
            if len(page) < _PAGE_ROWS:
                return
            after = (page[-1]["received_at"], page[-1]["id"])

    def image_suffix(self, image_hash: str) -> str | None:
        """File suffix of a stored image, or None when the hash is unknown."""
        with self.reading() as connection:
            return connection.execute(sql.select(images.c.suffix).where(images.c.hash == image_hash)).scalar()

    def label_watermark(self, start_us: int, end_us: int) -> int:
        """Highest label id among the predictions received in [start_us, end_us); 0 without labels."""
        joined = labels.join(predictions, labels.c.prediction_id == predictions.c.id)
        query = (
            sql.select(sql.func.max(labels.c.id))
            .select_from(joined)
            .where(predictions.c.received_at >= start_us, predictions.c.received_at < end_us)
        )
        with self.reading() as connection:
            return connection.execute(query).scalar() or 0

    # Monitoring

    def upsert_drift_report(self, row: dict[str, Any]) -> bool:
        """Writes one row per (window, model, reference, label watermark); returns False if it already read so.

        `created_at` is set on the first write and kept; an equal row is not written again.
        """
        key = [column.name for column in DRIFT_KEY]
        same_key = sql.and_(*(column == row[column.name] for column in DRIFT_KEY))
        with self.writing() as connection:
            stored = connection.execute(sql.select(drift_reports).where(same_key)).mappings().first()
            if stored is not None and all(stored[name] == value for name, value in row.items()):
                return False
            statement = self._insert(drift_reports).values(created_at=now_us(), **row)
            update = {name: statement.excluded[name] for name in row if name not in key}
            connection.execute(statement.on_conflict_do_update(index_elements=key, set_=update))
            return True

    def find_drift_report(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The drift row with this window_start, window_end, model_version, reference and label_watermark, or None."""
        same_key = sql.and_(*(column == key[column.name] for column in DRIFT_KEY))
        with self.reading() as connection:
            return next(map(_row, connection.execute(sql.select(drift_reports).where(same_key)).mappings()), None)

    def drift_reports(self, start_us: int | None = None, end_us: int | None = None) -> list[dict[str, Any]]:
        """Drift rows by window, model and label watermark; optionally only windows inside [start_us, end_us]."""
        table = drift_reports.c
        query = sql.select(drift_reports).order_by(table.window_start, table.model_version, table.label_watermark)
        if start_us is not None:
            query = query.where(table.window_start >= start_us)
        if end_us is not None:
            query = query.where(table.window_end <= end_us)
        with self.reading() as connection:
            return [_row(row) for row in connection.execute(query).mappings()]

    def raise_alarm(self, row: dict[str, Any]) -> bool:
        """Stores an alarm unless its `dedupe_key` is known; returns whether it is new. See `insert_alarm`."""
        with self.writing() as connection:
            return insert_alarm(connection, row) is not None

    def alarms(self, unacknowledged_only: bool = False) -> list[dict[str, Any]]:
        """Alarms, newest first."""
        query = sql.select(alarms).order_by(alarms.c.raised_at.desc(), alarms.c.id.desc())
        if unacknowledged_only:
            query = query.where(alarms.c.acknowledged_at.is_(None))
        with self.reading() as connection:
            return [_row(row) for row in connection.execute(query).mappings()]

    # Decisions

    def append_audit(self, actor: str, action: str, subject: str, detail: dict[str, Any]) -> dict[str, Any]:
        """Adds one entry to the audit chain and returns it."""
        with self.writing() as connection:
            return self._append_audit(connection, actor, action, subject, detail)

    def _append_audit(self, connection: Connection, actor: str, action: str, subject: str, detail: dict) -> dict:
        if self.engine.dialect.name == "postgresql":
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        last = connection.execute(sql.select(audit).order_by(audit.c.id.desc()).limit(1)).mappings().first()
        entry = audit_chain.next_entry(last, now_us(), actor, action, subject, detail)
        connection.execute(sql.insert(audit).values(**entry))
        return entry

    def audit_entries(self) -> list[dict[str, Any]]:
        """The audit chain, oldest first; `audit_chain.verify` checks it."""
        with self.reading() as connection:
            return [_row(row) for row in connection.execute(sql.select(audit).order_by(audit.c.id)).mappings()]

    def record_approval(
        self, model_version: str, approver: str, reason: str, decision: str = "promote", gate: dict | None = None
    ) -> int:
        """Stores a named person's decision on a model version, with its audit entry; returns the approval's id.

        Args:
            gate: one with a `registry_event` is stored once, whoever comes first.
        """
        gate = gate or {}
        key = gate.get("registry_event")
        with self.writing() as connection:
            if key is not None:
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
                for number, known in connection.execute(sql.select(approvals.c.id, approvals.c.gate)):
                    if known.get("registry_event") == key:
                        return number
            return self._record_decision(connection, model_version, approver, reason, decision, gate)

    def _record_decision(
        self, connection: Connection, model_version: str, person: str, reason: str, decision: str, gate: dict[str, Any]
    ) -> int:
        values = {"model_version": model_version, "approver": person, "reason": reason, "decision": decision}
        result = connection.execute(sql.insert(approvals).values(**values, gate=gate, decided_at=now_us()))
        self._append_audit(connection, person, decision, f"model/{model_version}", {"reason": reason, "gate": gate})
        return result.inserted_primary_key[0]

    def approvals(self) -> list[dict[str, Any]]:
        """Approvals, newest first."""
        with self.reading() as connection:
            rows = connection.execute(sql.select(approvals).order_by(approvals.c.id.desc())).mappings()
            return [_row(row) for row in rows]
