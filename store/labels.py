"""Experts' labels: appended, never changed; a malignant one on a record below its threshold raises an alarm.

What several readers' labels come to is `label_consensus`'s to say.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection, RowMapping

from store.alarm_topics import insert_alarm
from store.connection import ADVISORY_LOCK
from store.database import Store
from store.erased_patients import keep_erasures_out
from store.tables import labels, now_us, predictions

MISSED_CANCER = "missed_cancer"
API = "api"
"""Source of labels that come one by one."""


class ReaderAdjudicatesError(Exception):
    """Who is to settle a case has read it before: a third person has to."""


@dataclass(frozen=True)
class NewLabel:
    """What an expert says of a prediction.

    Attributes:
        labelled_at: microseconds UTC; None is now.
        confidence: 0 to 1.
        adjudication: settles what readers see differently.
        source: where it comes from: the API, or a file of which kind.
        external_id: its name there, which is stored once; None for one that has none.
    """

    prediction_id: str
    label: str
    malignant: bool
    labeller: str
    labelled_at: int | None = None
    confidence: float | None = None
    comment: str | None = None
    adjudication: bool = False
    source: str = API
    external_id: str | None = None

    def repeats(self, stored: RowMapping) -> bool:
        """Whether a stored label of the same labeller says the same."""
        names = ("label", "malignant", "confidence", "comment", "adjudication")
        same = all(getattr(self, name) == stored[name] for name in names)
        return same and self.labelled_at in (None, stored["labelled_at"])


class AddedLabel(NamedTuple):
    """What became of a label.

    Attributes:
        row: as stored; of one that is not new, the row that stands for it.
        alarm: the row of the alarm that it raised, or None.
        outdated: an imported one that is older than what its labeller has said since, which is `row`.
    """

    row: dict[str, Any]
    is_new: bool
    alarm: dict[str, Any] | None
    outdated: bool = False


def missed_cancer_key(prediction_id: str) -> str:
    """The dedupe key of a prediction's alarm."""
    return f"{MISSED_CANCER}:{prediction_id}"


def add_label(store: Store, label: NewLabel, actor: str) -> AddedLabel | None:
    """Stores a label, its audit entry and the alarm that it raises, in one transaction; None: no such prediction.

    A labeller's later label names the one before it in `supersedes`. One that repeats the labeller's latest is not
    stored again; nor is an imported one that is known by its `external_id`, or that is dated before the labeller's
    latest: an old file must not undo what came after it.

    Args:
        actor: who sent it, for the audit trail.

    Raises:
        ReaderAdjudicatesError: an adjudication by a reader of this prediction.
    """
    with store.writing() as connection:
        # An erasure that has looked for labels already would delete the prediction and leave this one.
        keep_erasures_out(connection)
        columns = ("id", "role", "model_version", "risk", "threshold", "abstained")
        # Locked, so that two labels of one prediction come one after the other.
        query = sql.select(*(predictions.c[name] for name in columns)).where(predictions.c.id == label.prediction_id)
        prediction = connection.execute(query.with_for_update()).mappings().first()
        if prediction is None:
            return None
        if connection.dialect.name == "postgresql":
            # As `_append_audit` below, but before the label has an id: ids then become visible in their order, and who
            # has read up to one misses none before it.
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        known = _by_external_id(connection, label)
        if known is not None:
            return AddedLabel(dict(known), False, None)
        latest = _latest(connection, label)
        if latest is not None and label.repeats(latest):
            return AddedLabel(dict(latest), False, None)
        if latest is not None and label.external_id is not None and label.labelled_at is not None:
            if label.labelled_at < latest["labelled_at"]:
                return AddedLabel(dict(latest), False, None, outdated=True)
        if label.adjudication:
            _check_adjudicator(connection, label)
        row = {
            "prediction_id": label.prediction_id,
            "label": label.label,
            "malignant": label.malignant,
            "labeller": label.labeller,
            "labelled_at": now_us() if label.labelled_at is None else label.labelled_at,
            "confidence": label.confidence,
            "comment": label.comment,
            "supersedes": None if latest is None else latest["id"],
            "source": label.source,
            "external_id": label.external_id,
            "adjudication": label.adjudication,
        }
        row["id"] = connection.execute(sql.insert(labels).values(**row)).inserted_primary_key[0]
        # The audit trail outlives an erasure: it says that someone labelled, not what they saw.
        detail = {"label_id": row["id"], "supersedes": row["supersedes"]}
        store._append_audit(connection, actor, "label", f"prediction/{label.prediction_id}", detail)
        alarm = _missed_cancer_alarm(prediction, row) if _missed(prediction, label) else None
        if alarm is not None:
            alarm = insert_alarm(connection, alarm)
        return AddedLabel(row, True, alarm)


def _latest(connection: Connection, label: NewLabel) -> RowMapping | None:
    query = (
        sql.select(labels)
        .where(labels.c.prediction_id == label.prediction_id, labels.c.labeller == label.labeller)
        .order_by(labels.c.id.desc())
        .limit(1)
    )
    return connection.execute(query).mappings().first()


def _by_external_id(connection: Connection, label: NewLabel) -> RowMapping | None:
    if label.external_id is None:
        return None
    query = sql.select(labels).where(labels.c.source == label.source, labels.c.external_id == label.external_id)
    return connection.execute(query).mappings().first()


def _check_adjudicator(connection: Connection, label: NewLabel) -> None:
    query = sql.select(labels.c.labeller).where(
        labels.c.prediction_id == label.prediction_id, sql.not_(labels.c.adjudication)
    )
    readers = sorted(set(connection.execute(query).scalars()))
    if _person(label.labeller) in map(_person, readers):
        raise ReaderAdjudicatesError(
            f"labeller: {label.labeller!r} has read prediction {label.prediction_id!r}; expected a person who has not, "
            "to settle it"
        )


def _person(name: str) -> str:
    """A name as it is compared: letter case, spaces and Unicode forms make no second person."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _missed(prediction: RowMapping, label: NewLabel) -> bool:
    """A cancer that the answer called negative: an abstained picture went to a person, a shadow answered nobody."""
    risk, threshold = prediction["risk"], prediction["threshold"]
    answered = prediction["role"] == "champion" and not prediction["abstained"]
    return label.malignant and answered and risk is not None and threshold is not None and risk < threshold


def _missed_cancer_alarm(prediction: RowMapping, label: dict[str, Any]) -> dict[str, Any]:
    return {
        "dedupe_key": missed_cancer_key(prediction["id"]),
        "topic": missed_cancer_key(prediction["id"]),
        "kind": MISSED_CANCER,
        "severity": "critical",
        "raised_at": now_us(),
        "model_version": prediction["model_version"],
        "message": (
            f"missed cancer: prediction {prediction['id']} of model {prediction['model_version']} has risk "
            f"{prediction['risk']:.4g}, below its threshold {prediction['threshold']:.4g}, and is labelled malignant"
        ),
        "detail": {
            "prediction_id": prediction["id"],
            "risk": prediction["risk"],
            "threshold": prediction["threshold"],
            "label_id": label["id"],
            "label": label["label"],
            "labeller": label["labeller"],
        },
    }
