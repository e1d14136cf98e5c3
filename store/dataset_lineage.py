"""Which labelled predictions a data set version holds, and which models learned from it.

A version is registered, with its predictions, before any of their pictures is copied (`building`), and finished once
its folder is whole (`ready`): an erasure that comes in between finds it too. What an erasure has deleted is `deleted`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.erased_patients import keep_erasures_out
from store.tables import candidates, dataset_predictions, dataset_versions, labels, now_us, predictions

BUILDING, READY, DELETED = "building", "ready", "deleted"
DATASET_READY = "dataset_version"
"""The audit trail's word for a version that is finished."""

# Below the fewest parameters that either database takes in one statement.
_CHUNK = 500


class Member(NamedTuple):
    """A prediction in a data set version: `label_id` is the label that its class rests on."""

    prediction_id: str
    label_id: int
    patient_hmac: str | None


class PredictionsGoneError(Exception):
    """Predictions of a data set version, or their labels, are no longer stored: erased, or past their retention."""


def register_dataset_version(
    store: Store, digest: str, path: str, parent_digest: str | None, detail: dict[str, Any], members: Sequence[Member]
) -> None:
    """Stores a version as `building`, and its predictions, in one transaction; one that is registered already is left
    as it is, but for its path and, once deleted, its state.

    Args:
        path: its folder; with `detail`, all that an erasure needs to find its files.
        parent_digest: of the version without these predictions.
        detail: no patient content: it stays when the version is deleted.

    Raises:
        PredictionsGoneError: nothing was stored.
    """
    with store.writing() as connection:
        keep_erasures_out(connection)
        _check_members(connection, members)
        values = {"digest": digest, "path": path, "parent_digest": parent_digest, "detail": detail}
        values |= {"created_at": now_us(), "num_rows": 0, "state": BUILDING, "deleted_at": None}
        statement = store._insert(dataset_versions).values(**values)
        connection.execute(statement.on_conflict_do_nothing())
        known = dataset_versions.c.digest == digest
        again = sql.update(dataset_versions).where(known, dataset_versions.c.state == DELETED)
        # Anew, also to an erasure that looks for versions made since the one before.
        connection.execute(again.values(state=BUILDING, deleted_at=None, created_at=now_us()))
        connection.execute(sql.update(dataset_versions).where(known).values(path=path))
        rows = [{"dataset_digest": digest, **member._asdict()} for member in members]
        for chunk in _chunks(rows):
            connection.execute(store._insert(dataset_predictions).on_conflict_do_nothing(), chunk)


def finish_dataset_version(store: Store, digest: str, num_rows: int, actor: str) -> None:
    """Sets a registered version `ready`, with its audit entry; again it changes nothing.

    Raises:
        PredictionsGoneError: an erasure took the version, or predictions of it, since it was registered. Its folder is
            to be removed.
    """
    with store.writing() as connection:
        keep_erasures_out(connection)
        query = sql.select(dataset_versions).where(dataset_versions.c.digest == digest).with_for_update()
        row = connection.execute(query).mappings().first()
        if row is None or row["state"] == DELETED:
            raise PredictionsGoneError(f"data set version {digest[:12]} was deleted while it was made")
        held = sql.select(dataset_predictions).where(dataset_predictions.c.dataset_digest == digest)
        members = [
            Member(member["prediction_id"], member["label_id"], member["patient_hmac"])
            for member in connection.execute(held).mappings()
        ]
        _check_members(connection, members)
        if row["state"] == READY:
            return
        known = dataset_versions.c.digest == digest
        connection.execute(sql.update(dataset_versions).where(known).values(state=READY, num_rows=num_rows))
        detail = {"parent_digest": row["parent_digest"], "num_rows": num_rows, "predictions": len(members)}
        store._append_audit(connection, actor, DATASET_READY, f"dataset/{digest}", detail)


def _check_members(connection: Connection, members: Sequence[Member]) -> None:
    gone = 0
    for chunk in _chunks(members):
        ids, label_ids = [member.prediction_id for member in chunk], {member.label_id for member in chunk}
        found = connection.execute(sql.select(sql.func.count()).where(predictions.c.id.in_(ids))).scalar_one()
        known = connection.execute(sql.select(sql.func.count()).where(labels.c.id.in_(label_ids))).scalar_one()
        gone += max(len(ids) - found, len(label_ids) - known)
    if gone:
        raise PredictionsGoneError(f"{gone} of {len(members)} labelled predictions are no longer stored")


def find_dataset_version(store: Store, digest: str) -> dict[str, Any] | None:
    """The version's row, or None."""
    with store.reading() as connection:
        query = sql.select(dataset_versions).where(dataset_versions.c.digest == digest)
        row = connection.execute(query).mappings().first()
        return None if row is None else dict(row)


def datasets_of_patient(store: Store, patient_hmac: str) -> list[dict[str, Any]]:
    """Rows of the versions, building or ready, that hold predictions of a patient; oldest first."""
    theirs = sql.select(dataset_predictions.c.dataset_digest).where(dataset_predictions.c.patient_hmac == patient_hmac)
    query = (
        sql.select(dataset_versions)
        .where(dataset_versions.c.digest.in_(theirs), dataset_versions.c.state != DELETED)
        .order_by(dataset_versions.c.created_at, dataset_versions.c.digest)
    )
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


class Use(NamedTuple):
    """A data set version that holds a prediction, its state, and the versions of the models trained on it."""

    dataset_digest: str
    state: str
    model_versions: list[str]


def lineage_of_prediction(store: Store, prediction_id: str) -> list[Use]:
    """Where a prediction was learned from: by time of the data set version, its models in order of their making."""
    held = (
        sql.select(dataset_versions.c.digest, dataset_versions.c.state)
        .join(dataset_predictions, dataset_predictions.c.dataset_digest == dataset_versions.c.digest)
        .where(dataset_predictions.c.prediction_id == prediction_id)
        .order_by(dataset_versions.c.created_at, dataset_versions.c.digest)
    )
    with store.reading() as connection:
        versions = connection.execute(held).all()
        digests = [digest for digest, _ in versions]
        trained = (
            sql.select(candidates.c.dataset_digest, candidates.c.model_version)
            .where(candidates.c.dataset_digest.in_(digests))
            .order_by(candidates.c.created_at, candidates.c.model_version)
        )
        models = connection.execute(trained).all() if digests else []
    return [Use(digest, state, [model for used, model in models if used == digest]) for digest, state in versions]


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]
