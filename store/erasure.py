"""Erases a patient: rows first, in one transaction with the audit entry that lists the files still to be removed, and
with the time after which nothing older of the patient is written any more (see `erased_patients`). Exports and data
sets are noted as pending in the same transaction, for the job erase_patient (see `erasure_reach`).

Whatever interrupts it, the same call again finishes it. SQLite overwrites deleted rows (`secure_delete`), and its
write-ahead log is emptied at the end. PostgreSQL keeps dead rows until its autovacuum comes by, and its write-ahead log
as long as its archive says; backups of either are the operator's.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store, StoreUnavailableError
from store.erased_patients import (
    FILES_REMOVED,
    ROWS_ERASED,
    audit_subject,
    keep_writers_out,
    note_erasure,
)
from store.erasure_reach import erased_since, mark_pending, pending_copies
from store.image_files import ImageFiles
from store.labels import MISSED_CANCER
from store.shadow_records import shadow_id
from store.spool import Spool
from store.submissions import erase_submissions, images_in_submissions, images_of_submissions
from store.tables import alarms, audit, images, labels, predictions

logger = logging.getLogger(__name__)

# Hashes per statement, below the fewest parameters that either database takes; and files per hold of the lock.
_CHUNK = 200


@dataclass
class Erasure:
    """What one call removed.

    Attributes:
        counts: removed predictions, submissions, labels and images (rows), spooled rows, and alarms whose detail was
            blanked, by name.
        image_files: files removed, also such as an interrupted call left behind.
        log_emptied: False while a reader keeps SQLite from emptying its write-ahead log, in which deleted bytes remain.
        pending: exports and data sets that the job erase_patient has still to look through for the patient, by name.
    """

    counts: dict[str, int] = field(default_factory=dict)
    image_files: int = 0
    log_emptied: bool = True
    pending: dict[str, int] = field(default_factory=dict)


class PatientErasure:
    """Erases patients from a store, its images and this machine's spool."""

    def __init__(self, store: Store, image_files: ImageFiles, spool: Spool):
        self._store = store
        self._image_files = image_files
        self._spool = spool

    def erase(self, patient_hmac: str, actor: str) -> Erasure:
        """Removes everything of a patient; a second call finds nothing and leaves no second entry.

        Raises:
            StoreUnavailableError: interrupted; the same call again finishes it.
        """
        try:
            # No replay between the rows and the spool, or it would bring rows back.
            with self._spool.locked(), self._image_files.locked(exclusive=True):
                counts = self._erase_rows(patient_hmac, actor)
                self._spool.erase_patient(patient_hmac)
            files = self.remove_files(patient_hmac, actor)
        except OSError as error:
            raise StoreUnavailableError(f"erasure is not finished: {error}") from error
        emptied = empty_write_ahead_log(self._store)
        return Erasure(counts, files, emptied, pending_copies(self._store, patient_hmac))

    def erase_prediction(self, prediction_id: str, patient_hmac: str, actor: str) -> bool:
        """Removes one prediction of a patient who was erased while it was made; False where it is not stored.

        Raises:
            StoreUnavailableError: interrupted; the patient's erasure, sent again, finishes it.
        """
        ids = (prediction_id, shadow_id(prediction_id))
        theirs = sql.and_(predictions.c.id.in_(ids), predictions.c.patient_hmac == patient_hmac)
        try:
            with self._image_files.locked(exclusive=True), self._store.writing() as connection:
                keep_writers_out(connection)
                counts, hashes = delete_predictions(connection, theirs)
                if not counts["predictions"]:
                    return False
                self._finish_rows(connection, patient_hmac, actor, counts, hashes, since=None)
            self.remove_files(patient_hmac, actor)
        except OSError as error:
            raise StoreUnavailableError(f"erasure is not finished: {error}") from error
        empty_write_ahead_log(self._store)
        return True

    def _erase_rows(self, patient_hmac: str, actor: str) -> dict[str, int]:
        # Also of rows that only the spool holds: their image may have been written before the row was refused.
        num_spooled, spooled_hashes = self._spool.patient_rows(patient_hmac)
        with self._store.writing() as connection:
            keep_writers_out(connection)
            submitted_hashes = images_of_submissions(connection, patient_hmac)
            counts, hashes = delete_predictions(connection, predictions.c.patient_hmac == patient_hmac)
            counts |= {"submissions": erase_submissions(connection, patient_hmac), "spooled": num_spooled}
            # Where rows went, a copy of any age may hold them.
            since = None if any(counts.values()) else erased_since(connection, patient_hmac)
            hashes |= submitted_hashes | spooled_hashes
            self._finish_rows(connection, patient_hmac, actor, counts, hashes, since)
            note_erasure(connection, self._store._insert, patient_hmac)
        return counts

    def _finish_rows(
        self,
        connection: Connection,
        patient_hmac: str,
        actor: str,
        counts: dict[str, int],
        hashes: set[str],
        since: int | None,
    ) -> None:
        """Removes the rows of images that nothing uses any more, notes copies as pending (`since`: see `mark_pending`),
        and in the audit trail what went."""
        unused = sorted(hashes - images_in_use(connection, hashes))
        counts["images"] = sum(
            connection.execute(sql.delete(images).where(images.c.hash.in_(chunk))).rowcount for chunk in _chunks(unused)
        )
        num_marked = mark_pending(connection, patient_hmac, since)
        if num_marked or any(counts.values()):
            detail = {"counts": counts, "image_hashes": unused}
            if num_marked:
                detail["pending_copies"] = num_marked
            self._store._append_audit(connection, actor, ROWS_ERASED, audit_subject(patient_hmac), detail)

    def remove_files(self, patient_hmac: str, actor: str) -> int:
        """Removes the files that entries of the audit trail list and nothing uses; returns how many.

        Raises:
            OSError: a file cannot be removed; call it again.
            StoreUnavailableError: the database does not answer; call it again.
        """
        pending, through = self._pending_files(patient_hmac)
        if through is None:
            return 0
        removed = remove_unused(self._store, self._image_files, pending)
        detail = {"image_files": removed, "through": through}
        self._store.append_audit(actor, FILES_REMOVED, audit_subject(patient_hmac), detail)
        return removed

    def _pending_files(self, patient_hmac: str) -> tuple[set[str], int | None]:
        """Images of erased rows whose files are not known to be gone, and the last audit entry that lists some."""
        query = (
            sql.select(audit.c.id, audit.c.action, audit.c.detail)
            .where(audit.c.subject == audit_subject(patient_hmac), audit.c.action.in_([ROWS_ERASED, FILES_REMOVED]))
            .order_by(audit.c.id)
        )
        with self._store.reading() as connection:
            entries = connection.execute(query).all()
        done = max((detail["through"] for _, action, detail in entries if action == FILES_REMOVED), default=0)
        open_entries = [(id_, detail) for id_, action, detail in entries if action == ROWS_ERASED and id_ > done]
        hashes = {name for _, detail in open_entries for name in detail["image_hashes"]}
        return hashes, open_entries[-1][0] if open_entries else None


def delete_predictions(
    connection: Connection, theirs: sql.ColumnElement[bool], why: str = "the patient's records were erased"
) -> tuple[dict[str, int], set[str]]:
    """Removes predictions with what hangs on them: how many of each, and the hashes of their images.

    Args:
        why: what missed-cancer alarms say in place of the predictions.
    """
    ids = sql.select(predictions.c.id).where(theirs)
    query = sql.select(predictions.c.image_hash).where(theirs, predictions.c.image_hash.is_not(None))
    hashes = set(connection.execute(query.distinct()).scalars())
    counts = {
        "alarms": _blank_alarms(connection, ids, why),
        "labels": connection.execute(sql.delete(labels).where(labels.c.prediction_id.in_(ids))).rowcount,
        "predictions": connection.execute(sql.delete(predictions).where(theirs)).rowcount,
    }
    return counts, hashes


def _blank_alarms(connection: Connection, prediction_ids: sql.Select, why: str) -> int:
    """Takes what missed-cancer alarms say of the predictions out of them; kind, time and who saw them stay."""
    keys = prediction_ids.with_only_columns(sql.literal(f"{MISSED_CANCER}:") + predictions.c.id)
    changes = {
        "dedupe_key": sql.literal(f"{MISSED_CANCER}:erased:") + sql.cast(alarms.c.id, sql.String),
        "topic": None,
        "message": f"missed cancer: {why}",
        "detail": {"erased": True},
    }
    return connection.execute(sql.update(alarms).where(alarms.c.dedupe_key.in_(keys)).values(changes)).rowcount


def images_in_use(connection: Connection, hashes: Iterable[str]) -> set[str]:
    """Those of the hashes that a prediction or a submission names."""
    found: set[str] = set()
    for chunk in _chunks(sorted(hashes)):
        query = sql.select(predictions.c.image_hash).where(predictions.c.image_hash.in_(chunk)).distinct()
        named = set(connection.execute(query).scalars())
        # No index leads to a submission's picture; most have a prediction by now.
        others = [name for name in chunk if name not in named]
        found |= named | (images_in_submissions(connection, others) if others else set())
    return found


def remove_unused(store: Store, image_files: ImageFiles, hashes: Iterable[str]) -> int:
    """Removes the files, and rows of `images`, of those hashes that no prediction or submission names; returns how
    many files.

    Raises:
        OSError: a file cannot be removed.
        StoreUnavailableError: the database does not answer.
    """
    removed = 0
    for chunk in _chunks(sorted(hashes)):
        with image_files.locked(exclusive=True):
            # Rows first: a file without one is found again by a sweep.
            unused = _remove_unused_rows(store, chunk)
            removed += sum(image_files.remove(name) for name in unused)
    return removed


def _remove_unused_rows(store: Store, hashes: Sequence[str]) -> list[str]:
    """Removes rows of unused images, under the images' lock; returns the unused hashes, with or without a row."""
    with store.reading() as connection:
        unused = sorted(set(hashes) - images_in_use(connection, hashes))
        query = sql.select(images.c.hash).where(images.c.hash.in_(unused)).limit(1)
        any_row = connection.execute(query).first() is not None
    if any_row:
        with store.writing() as connection:
            # Looked up once more: a bucket has no lock, and a row may have come.
            keep_writers_out(connection)
            unused = sorted(set(unused) - images_in_use(connection, unused))
            connection.execute(sql.delete(images).where(images.c.hash.in_(unused)))
    return unused


def _chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def empty_write_ahead_log(store: Store) -> bool:
    """Moves SQLite's write-ahead log into the database and truncates it; False while readers hold on to it.

    True on PostgreSQL, whose log is its administrator's.
    """
    if store.engine.dialect.name != "sqlite":
        return True
    try:
        # Not through a transaction, in which a checkpoint is refused.
        with closing(store.engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except sqlite3.Error as error:
        raise StoreUnavailableError(f"store {store.url} cannot empty its write-ahead log: {error}") from error
    if busy:
        logger.error("a reader keeps the write-ahead log of %s, and deleted rows in it; erase again", store.url)
    return not busy
