"""Copies of the log that an erasure has to reach: exports and data set versions, which the service may not be able to
open. The erasure's transaction notes the patient as pending on every copy that could hold rows of theirs; the job
erase_patient opens each, rewrites it where it does, and takes the note away."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.erased_patients import keep_writers_out
from store.tables import candidates, dataset_predictions, dataset_versions, erased_patients, exports, predictions

WRITING, CURRENT, DELETED = "writing", "current", "deleted"
"""States of an export."""
BUILDING, READY = "building", "ready"
"""States of a data set version, which may be `deleted` too."""
_COPIES = {"exports": (exports, exports.c.id), "datasets": (dataset_versions, dataset_versions.c.digest)}


@dataclass(frozen=True)
class PendingDataset:
    """A registered data set version from which patients are still to be removed; `patients` are pseudonyms,
    `replaced_by` the digest of the version that has taken its place already."""

    digest: str
    path: str
    state: str
    patients: frozenset[str]
    replaced_by: str | None


def pending_patients(detail: Mapping[str, Any]) -> list[str]:
    """Pseudonyms that a copy's `detail` notes as still to be removed."""
    return list(detail.get("pending", ()))


def with_pending(detail: Mapping[str, Any], patients: Iterable[str]) -> dict[str, Any]:
    """The `detail` with these pseudonyms as pending, in order, so that equal states are equal rows."""
    kept = {name: value for name, value in detail.items() if name != "pending"}
    listed = sorted(set(patients))
    return {**kept, "pending": listed} if listed else kept


def mark_pending(connection: Connection, patient_hmac: str, since: int | None) -> int:
    """Notes a patient on every copy that could hold rows of theirs; under `keep_writers_out`, in the transaction that
    removes the rows. Which copies hold some is not known here: retention may have removed a row since it was copied.

    Args:
        since: microseconds; copies older than it were told by an erasure before, and no row of the patient has been in
            the store since. None: every copy.

    Returns:
        How many copies the patient was not noted on before.
    """
    marked = 0
    for table, key in _COPIES.values():
        query = sql.select(key, table.c.detail).where(table.c.state != DELETED)
        if since is not None:
            query = query.where(sql.or_(table.c.created_at >= since, table.c.state == WRITING))
        for name, detail in connection.execute(query).all():
            patients = pending_patients(detail)
            if patient_hmac not in patients:
                values = {"detail": with_pending(detail, [*patients, patient_hmac])}
                connection.execute(sql.update(table).where(key == name).values(values))
                marked += 1
    return marked


def pending_copies(store: Store, patient_hmac: str | None = None) -> dict[str, int]:
    """How many exports and data sets are still to be looked through, for one patient or for any."""
    counts = {}
    with store.reading() as connection:
        for name, (table, _) in _COPIES.items():
            details = connection.execute(sql.select(table.c.detail).where(table.c.state != DELETED)).scalars()
            waiting = (pending_patients(detail) for detail in details)
            counts[name] = sum(bool(found) and patient_hmac in (None, *found) for found in waiting)
    return counts


def erased_since(connection: Connection, patient_hmac: str) -> int | None:
    """When the patient was erased last, microseconds; None: never."""
    query = sql.select(erased_patients.c.erased_at).where(erased_patients.c.patient_hmac == patient_hmac)
    return connection.execute(query).scalar()


# Data sets


def note_found_dataset(store: Store, digest: str, path: str, created_at: int, num_rows: int) -> None:
    """Registers a version that was made without the store, with all patients pending who were erased after it was made.

    One that is registered is left alone, except that a path that moved is followed.

    Args:
        created_at: microseconds, of its dataset.json.
    """
    with store.writing() as connection:
        keep_writers_out(connection)
        known = connection.execute(
            sql.select(dataset_versions.c.path, dataset_versions.c.state).where(dataset_versions.c.digest == digest)
        ).first()
        if known is not None and known.state != DELETED:
            if known.path != path:
                moved = sql.update(dataset_versions).where(dataset_versions.c.digest == digest).values(path=path)
                connection.execute(moved)
            return
        later = sql.select(erased_patients.c.patient_hmac).where(erased_patients.c.erased_at >= created_at)
        detail = with_pending({"found": True, "looked_at": True}, connection.execute(later).scalars())
        row = {"path": path, "created_at": created_at, "num_rows": num_rows, "state": READY, "detail": detail}
        if known is not None:
            # Its digest names what it was made of: made again from the operator's files, it is the same version again.
            values = {**row, "deleted_at": None}
            connection.execute(sql.update(dataset_versions).where(dataset_versions.c.digest == digest).values(values))
            return
        connection.execute(sql.insert(dataset_versions).values(digest=digest, parent_digest=None, **row))


def mark_new_datasets(store: Store) -> int:
    """Notes on each version, once, who may have been erased while it was made: since the version before it was made,
    from which it took its rows, and all whose lineage names predictions that are no longer stored. Returns how many
    versions were noted."""
    version, parent = dataset_versions, dataset_versions.alias("parent")
    joined = version.outerjoin(parent, version.c.parent_digest == parent.c.digest)
    query = sql.select(version.c.digest, version.c.detail, version.c.created_at, parent.c.created_at)
    lineage, num_marked = dataset_predictions.c, 0
    with store.writing() as connection:
        keep_writers_out(connection)
        for digest, detail, made_at, parent_made_at in connection.execute(
            query.select_from(joined).where(version.c.state == READY)
        ).all():
            if detail.get("looked_at"):
                continue
            since = made_at if parent_made_at is None else parent_made_at
            erased = sql.select(erased_patients.c.patient_hmac).where(erased_patients.c.erased_at >= since)
            returned = (
                sql.select(lineage.patient_hmac)
                .distinct()
                .where(lineage.dataset_digest == digest, _unstored())
                .where(lineage.patient_hmac.in_(sql.select(erased_patients.c.patient_hmac)))
            )
            found = {*connection.execute(erased).scalars(), *connection.execute(returned).scalars()}
            marked = with_pending({**detail, "looked_at": True}, {*pending_patients(detail), *found})
            here = version.c.digest == digest
            connection.execute(sql.update(version).where(here).values(detail=marked))
            num_marked += bool(found)
    return num_marked


def _unstored() -> sql.ColumnElement[bool]:
    """Of a lineage row, that its prediction is gone: of a later visit it is still stored, since retention keeps what a
    living version names."""
    return ~sql.exists().where(predictions.c.id == dataset_predictions.c.prediction_id)


def pending_datasets(store: Store) -> list[PendingDataset]:
    """Versions from which patients are still to be removed, oldest first."""
    table = dataset_versions.c
    query = sql.select(table.digest, table.path, table.state, table.detail).where(table.state != DELETED)
    with store.reading() as connection:
        rows = connection.execute(query.order_by(table.created_at, table.digest)).all()
    return [
        PendingDataset(digest, path, state, frozenset(patients), detail.get("replaced_by"))
        for digest, path, state, detail in rows
        if (patients := pending_patients(detail))
    ]


def lineage_of_patients(store: Store, digest: str, patients: Collection[str]) -> tuple[set[str], set[str]]:
    """Ids of predictions that a version took from these patients: erased ones, and ones of later visits."""
    table = dataset_predictions.c
    query = sql.select(table.prediction_id, _unstored()).where(
        table.dataset_digest == digest, table.patient_hmac.in_(patients)
    )
    with store.reading() as connection:
        rows = connection.execute(query).all()
    return {row_id for row_id, gone in rows if gone}, {row_id for row_id, gone in rows if not gone}


def clear_dataset(store: Store, pending: PendingDataset) -> None:
    """The version holds nothing of its pending patients."""
    with store.writing() as connection:
        keep_writers_out(connection)
        _remove_lineage(connection, pending.digest, pending.patients)
        _remove_pending(connection, pending.digest, pending.patients)


def abandon_dataset(store: Store, pending: PendingDataset, actor: str, now: int) -> None:
    """Gives up a version that is being built, or whose files are gone: who builds it fails when it finishes."""
    with store.writing() as connection:
        keep_writers_out(connection)
        _mark_deleted(connection, pending, now)
        detail = {"replaced_by": None, "patients": len(pending.patients), "state": pending.state}
        store._append_audit(connection, actor, "erase_from_dataset", f"dataset/{pending.digest}", detail)


def replace_dataset(store: Store, pending: PendingDataset, digest: str, path: str, num_rows: int) -> None:
    """Registers the version that takes another's place, with the lineage of those who stay; the old one stays known
    until its files are gone."""
    lineage = dataset_predictions
    with store.writing() as connection:
        keep_writers_out(connection)
        old = connection.execute(
            sql.select(dataset_versions).where(dataset_versions.c.digest == pending.digest).with_for_update()
        ).mappings()
        row_before = old.one()
        detail = row_before["detail"]
        # Who was erased meanwhile is still in the new version.
        others = set(pending_patients(detail)) - pending.patients
        kept = {name: value for name, value in detail.items() if name != "replaced_by"}
        row = {
            "digest": digest,
            "path": path,
            "parent_digest": pending.digest,
            # Of what it holds: whoever was erased since then was noted on the old version.
            "created_at": row_before["created_at"],
            "num_rows": num_rows,
            "state": READY,
        }
        # There is a row already where an interrupted run left the folder, which was then found, or where the same rows
        # were left once before.
        known = sql.select(dataset_versions.c.detail).where(dataset_versions.c.digest == digest)
        others |= set(pending_patients(connection.execute(known).scalar() or {}))
        row["detail"] = with_pending(kept, others)
        insert = store._insert(dataset_versions).values(row)
        again = {name: insert.excluded[name] for name in row if name != "digest"} | {"deleted_at": None}
        connection.execute(insert.on_conflict_do_update(index_elements=["digest"], set_=again))
        copied = sql.select(
            sql.literal(digest), lineage.c.prediction_id, lineage.c.label_id, lineage.c.patient_hmac
        ).where(
            lineage.c.dataset_digest == pending.digest,
            sql.or_(
                lineage.c.patient_hmac.is_(None), lineage.c.patient_hmac.not_in(pending.patients), sql.not_(_unstored())
            ),
        )
        columns = ["dataset_digest", "prediction_id", "label_id", "patient_hmac"]
        insert = store._insert(lineage).from_select(columns, copied)
        connection.execute(insert.on_conflict_do_nothing())
        _remove_lineage(connection, pending.digest, pending.patients)
        values = {"detail": {**detail, "replaced_by": digest}}
        connection.execute(
            sql.update(dataset_versions).where(dataset_versions.c.digest == pending.digest).values(values)
        )


def delete_dataset(
    store: Store, pending: PendingDataset, replaced_by: str | None, models: list[str], actor: str, now: int
) -> None:
    """The version's files are gone: its row says so, and the audit trail names its successor (None: no row was left)
    and the models that have learned from it."""
    with store.writing() as connection:
        keep_writers_out(connection)
        _mark_deleted(connection, pending, now)
        detail = {"replaced_by": replaced_by, "patients": len(pending.patients), "models": models}
        store._append_audit(connection, actor, "erase_from_dataset", f"dataset/{pending.digest}", detail)


def models_of_dataset(store: Store, digest: str) -> list[str]:
    """Model versions that were trained on a data set version, as far as the store knows."""
    table = candidates.c
    with store.reading() as connection:
        query = sql.select(table.model_version).where(table.dataset_digest == digest).order_by(table.created_at)
        return list(connection.execute(query).scalars())


def _mark_deleted(connection: Connection, pending: PendingDataset, now: int) -> None:
    _remove_lineage(connection, pending.digest, pending.patients)
    here = dataset_versions.c.digest == pending.digest
    detail = connection.execute(sql.select(dataset_versions.c.detail).where(here)).scalar_one()
    # What is left describes the version, should it ever be made again.
    kept = {name: value for name, value in detail.items() if name not in ("pending", "looked_at", "replaced_by")}
    connection.execute(sql.update(dataset_versions).where(here).values(state=DELETED, deleted_at=now, detail=kept))


def _remove_lineage(connection: Connection, digest: str, patients: Collection[str]) -> None:
    table = dataset_predictions.c
    theirs = sql.and_(table.dataset_digest == digest, table.patient_hmac.in_(patients), _unstored())
    connection.execute(sql.delete(dataset_predictions).where(theirs))


def _remove_pending(connection: Connection, digest: str, patients: Collection[str]) -> None:
    here = dataset_versions.c.digest == digest
    detail = connection.execute(sql.select(dataset_versions.c.detail).where(here)).scalar_one()
    rest = set(pending_patients(detail)) - set(patients)
    connection.execute(sql.update(dataset_versions).where(here).values(detail=with_pending(detail, rest)))
