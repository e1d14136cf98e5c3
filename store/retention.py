"""Removes what is older than its retention: rows in short transactions, then pictures that nothing keeps.

Every call removes what is due now: an interrupted one, made again, goes on. Drift reports, the audit trail, tombstones
and lineage stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.erased_patients import keep_writers_out
from store.erasure import delete_predictions
from store.erasure_reach import DELETED
from store.image_files import ImageFiles
from store.labels import MISSED_CANCER
from store.shadow_records import SHADOW_SUFFIX
from store.submissions import DONE, FAILED, images_in_submissions
from store.tables import (
    alarm_deliveries,
    alarms,
    dataset_predictions,
    dataset_versions,
    images,
    labels,
    predictions,
    submissions,
)

BATCH_ROWS = 200
"""Rows per transaction, pictures per hold of the image folder's lock. Commits wait for one batch: 23 ms (p95 41) of
predictions, 14 (29) of pictures, on SQLite with 40,000 rows of 2.5 KB."""

_ROLES = ("champion", "shadow")
# A picture is stored in the transaction of its record or submission: younger ones are looked at by no one yet.
_MIN_IMAGE_AGE_US = 3_600_000_000

OnProgress = Callable[[str, int], None]


@dataclass(frozen=True)
class Cutoffs:
    """What goes: older than these times, microseconds UTC; None keeps all.

    Attributes:
        predictions: by `received_at`, with their labels, and pictures that nothing else uses.
        images: pictures that no younger record uses; the records stay.
        alarms: acknowledged ones, by `raised_at`, with what was delivered of them.
        submissions: finished ones, by `finished_at`.
        keep_labelled: labelled predictions stay, with their shadows and pictures; False: only those of a missed-cancer
            alarm that nobody has acknowledged.
    """

    predictions: int | None = None
    images: int | None = None
    alarms: int | None = None
    submissions: int | None = None
    keep_labelled: bool = True

    @property
    def concern_images(self) -> bool:
        """Whether pictures may be left without a record."""
        return any(cutoff is not None for cutoff in (self.predictions, self.images, self.submissions))


def count_due(store: Store, cutoffs: Cutoffs, now: int) -> dict[str, int]:
    """How many rows `apply_retention` would remove, by table. A picture counts once its records are gone, so pictures
    of predictions that are due are not in it."""
    counts = {}
    with store.reading() as connection:
        for name, (table, condition) in _row_conditions(cutoffs).items():
            counts[name] = connection.execute(sql.select(sql.func.count()).select_from(table).where(condition)).scalar()
        if cutoffs.concern_images:
            # As a set, which is made once: no index leads to a submission's picture.
            named = submissions.c.request["image_hash"].as_string()
            submitted = images.c.hash.in_(sql.select(named).where(named.is_not(None)))
            query = sql.select(sql.func.count()).select_from(images)
            counts["images"] = connection.execute(query.where(_image_condition(cutoffs, now), ~submitted)).scalar()
    return counts


def apply_retention(
    store: Store, image_files: ImageFiles, cutoffs: Cutoffs, now: int, on_progress: OnProgress = lambda name, num: None
) -> dict[str, int]:
    """Removes what is due; returns how many rows of each table, and `image_files`.

    Raises:
        StoreUnavailableError: the database does not answer; call it again.
        OSError: a picture cannot be removed; call it again.
    """
    counts: dict[str, int] = {}

    def add(name: str, number: int) -> None:
        counts[name] = counts.get(name, 0) + number
        on_progress(name, counts[name])

    conditions = _row_conditions(cutoffs)
    if "predictions" in conditions:
        for role in _ROLES:
            for removed in _remove_predictions(store, role, cutoffs):
                for name, number in removed.items():
                    add(name, number)
    for name in ("submissions", "alarms"):
        if name in conditions:
            table, condition = conditions[name]
            for number in _remove_rows(store, table, condition):
                add(name, number)
    if cutoffs.concern_images:
        for num_rows, num_files in _remove_images(store, image_files, cutoffs, now):
            add("images", num_rows)
            add("image_files", num_files)
    return counts


def _row_conditions(cutoffs: Cutoffs) -> dict[str, tuple[sql.Table, sql.ColumnElement[bool]]]:
    found: dict[str, tuple[sql.Table, sql.ColumnElement[bool]]] = {}
    if cutoffs.predictions is not None:
        old = sql.and_(predictions.c.role.in_(_ROLES), predictions.c.received_at < cutoffs.predictions)
        found["predictions"] = predictions, sql.and_(old, _unkept(cutoffs))
    if cutoffs.submissions is not None:
        finished = submissions.c.state.in_((DONE, FAILED))
        found["submissions"] = submissions, sql.and_(finished, submissions.c.finished_at < cutoffs.submissions)
    if cutoffs.alarms is not None:
        seen = alarms.c.acknowledged_at.is_not(None)
        found["alarms"] = alarms, sql.and_(seen, alarms.c.raised_at < cutoffs.alarms)
    return found


def _unkept(cutoffs: Cutoffs) -> sql.ColumnElement[bool]:
    # An alarm that nobody has seen stays, and must still say of which lesion it speaks; labels raise it.
    return sql.and_(~_in_living_dataset(), ~(_labelled() if cutoffs.keep_labelled else _missed_unseen()))


def _champion_id() -> sql.ColumnElement[str]:
    return sql.func.replace(predictions.c.id, SHADOW_SUFFIX, "")


def _labelled() -> sql.ColumnElement[bool]:
    """Also of a shadow whose champion is labelled: what it says of the lesion can be judged."""
    return sql.exists().where(labels.c.prediction_id == _champion_id())


def _missed_unseen() -> sql.ColumnElement[bool]:
    """A prediction whose missed-cancer alarm nobody has acknowledged."""
    key = sql.literal(f"{MISSED_CANCER}:") + _champion_id()
    return sql.exists().where(alarms.c.dedupe_key == key, alarms.c.acknowledged_at.is_(None))


def _in_living_dataset() -> sql.ColumnElement[bool]:
    """A prediction that a data set holds stays as long: it says whose the picture there is, and an erasure tells an
    erased record from one of a later visit by whether it is stored."""
    of_version = dataset_versions.c.digest == dataset_predictions.c.dataset_digest
    joined = dataset_predictions.join(dataset_versions, of_version)
    query = sql.select(sql.literal(1)).select_from(joined)
    return query.where(
        dataset_predictions.c.prediction_id == _champion_id(), dataset_versions.c.state != DELETED
    ).exists()


def _remove_predictions(store: Store, role: str, cutoffs: Cutoffs) -> Iterator[dict[str, int]]:
    """By (received_at, id): what is kept is passed over once."""
    table, unkept = predictions.c, _unkept(cutoffs)
    after: tuple[int, str] = (-(2**63), "")
    while True:
        query = (
            sql.select(table.received_at, table.id)
            .where(table.role == role, table.received_at >= after[0], table.received_at < cutoffs.predictions)
            .where(sql.or_(table.received_at > after[0], table.id > after[1]), unkept)
            .order_by(table.received_at, table.id)
            .limit(BATCH_ROWS)
        )
        with store.reading() as connection:
            batch = connection.execute(query).all()
        if not batch:
            return
        with store.writing() as connection:
            # A label that comes now would keep the prediction, or find none.
            keep_writers_out(connection)
            # By id alone: with the time, SQLite would walk the index on it through all that is old.
            theirs = sql.and_(table.id.in_([row_id for _, row_id in batch]), unkept)
            counts, _ = delete_predictions(connection, theirs, "the record is past its retention")
            # Blanked, not removed, as `alarms` says of others.
            counts["alarms_blanked"] = counts.pop("alarms")
        yield counts
        after = tuple(batch[-1])


def _remove_rows(store: Store, table: sql.Table, due: sql.ColumnElement[bool]) -> Iterator[int]:
    while True:
        with store.writing() as connection:
            ids = list(connection.execute(sql.select(table.c.id).where(due).limit(BATCH_ROWS)).scalars())
            if not ids:
                return
            if table is alarms:
                connection.execute(sql.delete(alarm_deliveries).where(alarm_deliveries.c.alarm_id.in_(ids)))
            number = connection.execute(sql.delete(table).where(table.c.id.in_(ids))).rowcount
        yield number


def _image_condition(cutoffs: Cutoffs, now: int) -> sql.ColumnElement[bool]:
    """Rows of `images` that no prediction keeps; submissions are asked apart, since no index leads to theirs."""
    keeps = [predictions.c.image_hash == images.c.hash]
    if cutoffs.images is not None:
        reasons = [predictions.c.received_at >= cutoffs.images]
        if cutoffs.keep_labelled:
            reasons.append(_labelled())
        keeps.append(sql.or_(*reasons))
    return sql.and_(images.c.stored_at < now - _MIN_IMAGE_AGE_US, ~sql.exists().where(*keeps))


def _remove_images(store: Store, image_files: ImageFiles, cutoffs: Cutoffs, now: int) -> Iterator[tuple[int, int]]:
    due = _image_condition(cutoffs, now)
    after = ""
    while True:
        query = sql.select(images.c.hash).where(images.c.hash > after, due).order_by(images.c.hash).limit(BATCH_ROWS)
        with store.reading() as connection:
            batch = list(connection.execute(query).scalars())
        if not batch:
            return
        after = batch[-1]
        # No record that names one of them can come while it goes; at a URL there is no such lock.
        with image_files.locked(exclusive=True):
            with store.reading() as connection:
                unused = _still_due(connection, batch, due)
            # Files before rows, for a row leads to its file again where a bucket cannot be swept.
            num_files = sum(image_files.remove(name) for name in unused)
            with store.writing() as connection:
                keep_writers_out(connection)
                still = _still_due(connection, unused, due)
                num_rows = connection.execute(sql.delete(images).where(images.c.hash.in_(still))).rowcount
        yield num_rows, num_files


def _still_due(connection: Connection, hashes: Sequence[str], due: sql.ColumnElement[bool]) -> list[str]:
    query = sql.select(images.c.hash).where(images.c.hash.in_(hashes), due).order_by(images.c.hash)
    unnamed = list(connection.execute(query).scalars())
    submitted = images_in_submissions(connection, unnamed) if unnamed else set()
    return [name for name in unnamed if name not in submitted]
