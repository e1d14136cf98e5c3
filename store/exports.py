"""Which Parquet files of the log exist: each is recorded before anyone can see it, so that an erasure knows them all.

Whoever changes a row holds its lock and keeps erasures out, no more: a file is moved meanwhile, on a bucket for
seconds, and predictions are committed all the same.

One row per path. Its state is `writing` from the first attempt until a file is published, `current` while there is one,
`deleted` after. Who writes holds the row's token; the last one to begin wins, and the others fail when they publish.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.erased_patients import keep_erasures_out
from store.erasure_reach import CURRENT, DELETED, WRITING, pending_patients, with_pending
from store.tables import exports, now_us


class LostExportError(RuntimeError):
    """Another run, or an erasure, has taken the file over; run the export again."""


@dataclass(frozen=True)
class ExportClaim:
    """The right to replace an export's file; `token` names its temporary file."""

    id: str
    path: str
    token: str


@dataclass(frozen=True)
class Written:
    """What a claim has written: rows, and the SHA-256 of the file."""

    num_rows: int
    sha256: str


def export_id(path: str) -> str:
    """The id of the export at a path or URL."""
    return hashlib.sha256(path.encode()).hexdigest()[:32]


def begin_export(store: Store, path: str, window_start: int, window_end: int) -> ExportClaim:
    """Records that a file is about to be written; one that is there stays until the new one is published.

    Args:
        window_start, window_end: microseconds; until it is published, the row's window spans the old file's too.
    """
    claim = ExportClaim(export_id(path), path, uuid.uuid4().hex)
    with store.writing() as connection:
        # Also where there is no row yet: an erasure either finds the row, or everything below comes after it.
        keep_erasures_out(connection)
        row = {
            "path": path,
            "window_start": window_start,
            "window_end": window_end,
            "state": WRITING,
            "deleted_at": None,
        }
        fresh = {**row, "created_at": now_us(), "num_rows": 0, "detail": {"token": claim.token}}
        insert = store._insert(exports).values(id=claim.id, **fresh).on_conflict_do_nothing()
        connection.execute(insert)
        found = _locked(connection, claim.id)
        if found["state"] == DELETED:
            values: dict[str, Any] = fresh
        else:
            values = {
                **row,
                "window_start": min(window_start, found["window_start"]),
                "window_end": max(window_end, found["window_end"]),
                "detail": {**found["detail"], "token": claim.token},
            }
        _update(connection, claim.id, values)
    return claim


def publish_export(
    store: Store,
    claim: ExportClaim,
    window: tuple[int, int],
    written: Written,
    cleaned: frozenset[str],
    unchanged: Callable[[], bool],
    move: Callable[[], None],
    actor: str,
    facts: dict[str, Any],
) -> frozenset[str] | None:
    """Puts a file in its place in the transaction that marks it current; no erasure runs meanwhile.

    Args:
        cleaned: patients that were removed from the file after they were erased while it was being written.
        unchanged: whether a file is in the place; asked where the row knows the same content, which is then left.
        move: puts the new file there.
        facts: what the audit entry says besides; no patient content.

    Returns:
        None when it is published; else the patients who were erased meanwhile and are to be removed from it first.

    Raises:
        LostExportError: the claim is no longer this run's.
    """
    with store.writing() as connection:
        keep_erasures_out(connection)
        row = _claimed(connection, claim)
        pending = frozenset(pending_patients(row["detail"]))
        if pending - cleaned:
            return pending
        detail = {name: value for name, value in row["detail"].items() if name not in ("token", "pending")}
        same = detail.get("sha256") == written.sha256 and unchanged()
        values = {"window_start": window[0], "window_end": window[1], "state": CURRENT, "num_rows": written.num_rows}
        if not same:
            move()
            values["created_at"] = now_us()
            entry = {"num_rows": written.num_rows, "sha256": written.sha256, **facts}
            store._append_audit(connection, actor, "export_predictions", f"export/{claim.id}", entry)
        _update_published(connection, claim.id, {**values, "detail": {**detail, "sha256": written.sha256}})
    return None


def _update_published(connection: Connection, row_id: str, values: dict[str, Any]) -> None:
    _update(connection, row_id, values)


def pending_exports(store: Store) -> list[str]:
    """Ids of exports from which patients are still to be removed, oldest first."""
    query = sql.select(exports.c.id, exports.c.detail).where(exports.c.state != DELETED)
    with store.reading() as connection:
        rows = connection.execute(query.order_by(exports.c.created_at, exports.c.id)).all()
    return [row_id for row_id, detail in rows if pending_patients(detail)]


def find_export(store: Store, row_id: str) -> dict[str, Any] | None:
    """The export's row, or None."""
    with store.reading() as connection:
        found = connection.execute(sql.select(exports).where(exports.c.id == row_id)).mappings().first()
        return None if found is None else dict(found)


def take_over_export(store: Store, row_id: str) -> tuple[ExportClaim, frozenset[str]]:
    """Claims an export for an erasure, whoever writes it now: the claim, and the patients to be removed."""
    with store.writing() as connection:
        keep_erasures_out(connection)
        row = _locked(connection, row_id)
        claim = ExportClaim(row_id, row["path"], uuid.uuid4().hex)
        _update(connection, row_id, {"detail": {**row["detail"], "token": claim.token}})
        return claim, frozenset(pending_patients(row["detail"]))


def finish_erasure(
    store: Store,
    claim: ExportClaim,
    patients: frozenset[str],
    actor: str,
    removed_rows: int = 0,
    written: Written | None = None,
    move: Callable[[], None] = lambda: None,
    exists: bool = True,
) -> None:
    """The file holds nothing of these patients: their note goes, in the transaction that moves a new file into place.

    Args:
        written: a new file, in whose audit entry `removed_rows` stands; None: the old one held nothing of them.
        exists: False: there is no file.

    Raises:
        LostExportError: another run has begun to write it; it is still pending.
    """
    with store.writing() as connection:
        keep_erasures_out(connection)
        row = _claimed(connection, claim)
        rest = frozenset(pending_patients(row["detail"])) - patients
        detail = {name: value for name, value in row["detail"].items() if name != "token"}
        values: dict[str, Any] = {"state": CURRENT}
        if not exists:
            values, rest = {"state": DELETED, "deleted_at": now_us()}, frozenset()
        elif written is not None:
            move()
            detail["sha256"], values["num_rows"] = written.sha256, written.num_rows
            entry = {"removed_rows": removed_rows, "patients": len(patients), "sha256": written.sha256}
            store._append_audit(connection, actor, "erase_from_export", f"export/{claim.id}", entry)
        _update(connection, claim.id, {**values, "detail": with_pending(detail, rest)})


def exports_before(store: Store, before: int) -> list[tuple[str, str]]:
    """Id and path of published exports that were written before a time (microseconds), oldest first."""
    table = exports.c
    query = sql.select(table.id, table.path).where(table.state == CURRENT, table.created_at < before)
    with store.reading() as connection:
        return [(row_id, path) for row_id, path in connection.execute(query.order_by(table.created_at, table.id))]


def remove_export(store: Store, row_id: str, *remove: Callable[[], Any]) -> None:
    """Removes an export's files and marks its row deleted; who is writing it fails when they publish.

    Args:
        remove: what takes the files away; called under the row's lock.
    """
    with store.writing() as connection:
        keep_erasures_out(connection)
        _locked(connection, row_id)
        for step in remove:
            step()
        _update(connection, row_id, {"state": DELETED, "deleted_at": now_us(), "detail": {}})


def _locked(connection: Connection, row_id: str) -> sql.RowMapping:
    query = sql.select(exports).where(exports.c.id == row_id)
    return connection.execute(query.with_for_update()).mappings().one()


def _claimed(connection: Connection, claim: ExportClaim) -> sql.RowMapping:
    row = _locked(connection, claim.id)
    if row["detail"].get("token") != claim.token:
        raise LostExportError(f"export {claim.path} was taken over by another run or an erasure; run it again")
    return row


def _update(connection: Connection, row_id: str, values: dict[str, Any]) -> None:
    connection.execute(sql.update(exports).where(exports.c.id == row_id).values(values))
