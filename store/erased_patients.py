"""When patients were erased, so that what was under way meanwhile is not written after it.

A row that names a patient and was received before the patient's erasure is late: its writer commits after the erasure,
from a request that was being scored, or from another machine's spool. Received later, it is of a new visit and stays.
The times come from the clocks of the machines that took the request and the erasure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.connection import ADVISORY_LOCK
from store.tables import erased_patients, now_us

ROWS_ERASED, FILES_REMOVED = "erase_patient", "erase_patient_files"
_LOCK = ADVISORY_LOCK + 1
# Built once: both run in every commit that names a patient.
_SHARE = sql.select(sql.func.pg_advisory_xact_lock_shared(_LOCK))
_ERASED_SINCE = sql.select(erased_patients.c.patient_hmac, erased_patients.c.erased_at).where(
    erased_patients.c.erased_at >= sql.bindparam("oldest")
)


class PatientErasedError(Exception):
    """The patient was erased after this was received: nothing of it was stored."""


def audit_subject(patient_hmac: str) -> str:
    """The subject of a patient's entries in the audit trail."""
    return f"patient/{patient_hmac}"


def keep_erasures_out(connection: Connection) -> None:
    """Lets no erasure run until this transaction ends; whoever adds what an erasure would have to find begins with it.

    On SQLite nothing is to be done: there is one write transaction at a time. PostgreSQL's writers share the lock, and
    each statement after it sees what the erasure before committed.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_SHARE)


def keep_writers_out(connection: Connection) -> None:
    """The erasure's side of `keep_erasures_out`; it also keeps a second erasure out, since each would leave a picture
    that both patients share to the other."""
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))


def note_erasure(connection: Connection, insert: Any, patient_hmac: str) -> None:
    """Notes that a patient is erased now; under `keep_writers_out`, after the deletions.

    At their end, so that a submission that was claimed while they waited for its row counts as received before.

    Args:
        insert: the `insert` of this database's dialect.
    """
    statement = insert(erased_patients).values(patient_hmac=patient_hmac, erased_at=now_us())
    # Never back in time, also where the clocks of two machines differ.
    later = statement.excluded.erased_at > erased_patients.c.erased_at
    values = {"erased_at": statement.excluded.erased_at}
    connection.execute(statement.on_conflict_do_update(index_elements=["patient_hmac"], set_=values, where=later))


def find_late(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """Places of the late ones among rows with `patient_hmac` and `received_at`; under `keep_erasures_out`.

    One look into an index, however many rows there are: at the erasures since the oldest was received, mostly none.
    """
    oldest = min((row["received_at"] for row in rows if row.get("patient_hmac") is not None), default=None)
    if oldest is None:
        return frozenset()
    erased = {patient: erased_at for patient, erased_at in connection.execute(_ERASED_SINCE, {"oldest": oldest})}
    if not erased:
        return frozenset()
    return frozenset(
        place for place, row in enumerate(rows) if row["received_at"] <= erased.get(row.get("patient_hmac"), -1)
    )
