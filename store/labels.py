"""Experts' labels: appended, never changed; a malignant one on a record below its threshold raises an alarm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection, RowMapping

from store.alarm_topics import insert_alarm
from store.database import Store
from store.erased_patients import keep_erasures_out
from store.tables import labels, now_us, predictions

MISSED_CANCER = "missed_cancer"


@dataclass(frozen=True)
class NewLabel:
    """What an expert says of a prediction.

    `labelled_at`: microseconds UTC; None is now. `confidence`: 0 to 1.
    """

    prediction_id: str
    label: str
    malignant: bool
    labeller: str
    labelled_at: int | None = None
    confidence: float | None = None
    comment: str | None = None

    def repeats(self, stored: RowMapping) -> bool:
        """Whether a stored label of the same labeller says the same."""
        same = all(getattr(self, name) == stored[name] for name in ("label", "malignant", "confidence", "comment"))
        return same and self.labelled_at in (None, stored["labelled_at"])


class AddedLabel(NamedTuple):
    """The label's row, whether it is new, and the alarm's row where it raised one."""

    row: dict[str, Any]
    is_new: bool
    alarm: dict[str, Any] | None


def missed_cancer_key(prediction_id: str) -> str:
    """The dedupe key of a prediction's alarm."""
    return f"{MISSED_CANCER}:{prediction_id}"


def add_label(store: Store, label: NewLabel, actor: str) -> AddedLabel | None:
    """Stores a label, its audit entry and the alarm that it raises, in one transaction; None: no such prediction.

    A labeller's later label names the one before it in `supersedes`. One that repeats the labeller's latest is not
    stored again.

    Args:
        actor: who sent it, for the audit trail.
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
        latest = _latest(connection, label)
        if latest is not None and label.repeats(latest):
            return AddedLabel(dict(latest), False, None)
        row = {
            "prediction_id": label.prediction_id,
            "label": label.label,
            "malignant": label.malignant,
            "labeller": label.labeller,
            "labelled_at": now_us() if label.labelled_at is None else label.labelled_at,
            "confidence": label.confidence,
            "comment": label.comment,
            "supersedes": None if latest is None else latest["id"],
            "source": "api",
            "external_id": None,
            "adjudication": False,
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
