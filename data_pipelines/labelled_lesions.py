"""Labelled production lesions, as rows that a data set version can add: which of them, with which class and group."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import sqlalchemy as sql
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipelines.metadata_table import QuarantinedRow
from modeling.locations import Location
from modeling.metadata_record import clean_record
from modeling.moments import MomentUs
from modeling.schema import TaskSpec
from store.database import Store
from store.label_consensus import Truth, truths_between
from store.tables import images, predictions

# Below the fewest parameters that either database takes in one statement.
_CHUNK = 500
_LATEST_US = 2**62
Pseudonym = Callable[[str], str]


class AddLabels(BaseModel):
    """Which labelled lesions of the prediction log are added to a data set."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)

    store_url: Location = "sqlite:///store.db"
    images_url: Location = "images"
    patient_key_file: Location | None = Field(
        "secrets/patient_hmac.key",
        description="the service's: finds patients of the base data set again; null: nobody is looked for",
    )
    since: MomentUs = Field(None, description="received then or later; null: from the first on")
    until: MomentUs = Field(None, description="received before; null: to the last")
    require: Literal["single", "agreed"] = Field(
        "agreed",
        description="agreed: two readers say the same, or a third has settled it; single: one reader is enough",
    )
    model_versions: list[str] | None = Field(None, description="only predictions of these models; null: of any")
    max_share: float = Field(
        0.5, gt=0.0, lt=1.0, description="of added rows among all; a random part if there are more"
    )

    required: bool = Field(True, description="false: where no lesion can be added, the data set is made without")

    @model_validator(mode="after")
    def _window(self) -> AddLabels:
        if self.since is not None and self.until is not None and self.until <= self.since:
            raise ValueError("until is not after since")
        return self


@dataclass(frozen=True)
class LabelledLesion:
    """One lesion to be added.

    Attributes:
        prediction_id: also the row's id.
        truth: what its labels come to.
        label: class index.
        group, context: fold group, and context group ("" = none): the base's own id of the patient where known there,
            else the pseudonym; without a patient, the lesion is its own group.
        metadata: the task's columns, checked; None = missing.
        image: hash and suffix of its picture; None in data sets of metadata alone.
    """

    prediction_id: str
    truth: Truth
    label: int
    group: str
    context: str
    patient_hmac: str | None
    institution: str | None
    received_at: int
    metadata: dict[str, float | str | None]
    image: tuple[str, str] | None

    @property
    def label_id(self) -> int:
        """The label that its class rests on."""
        return max(self.truth.label_ids)


@dataclass(frozen=True)
class LabelledLesions:
    """What the log has to add, by prediction id.

    Attributes:
        refused: lesions whose labels would do but that cannot be added, with a reason.
        waiting: labelled predictions whose labels do not do, by reason.
        patients_known: patients of these lesions who are in the base too; None where nobody was looked for.
    """

    lesions: list[LabelledLesion]
    refused: list[QuarantinedRow]
    waiting: dict[str, int]
    patients_known: int | None

    @property
    def digest(self) -> str:
        """sha256 over all that the added rows depend on."""
        content = [
            [
                *(lesion.prediction_id, lesion.truth.label_ids, lesion.label, lesion.group, lesion.context),
                *(lesion.institution, sorted(lesion.metadata.items()), lesion.image),
            ]
            for lesion in self.lesions
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def find_labelled_lesions(
    store: Store,
    settings: AddLabels,
    task: TaskSpec,
    base: pd.DataFrame,
    with_images: bool,
    pseudonym: Pseudonym | None,
) -> LabelledLesions:
    """Labelled lesions of the log, each picture once.

    Args:
        base: rows of the data set they are added to: id, group, context.
        with_images: whether every row needs a picture.
        pseudonym: the HMAC of a patient id, under which the log knows it; None: patients are not looked for.
    """
    truths, waiting = _truths(store, settings)
    known = _known_patients(base, task, pseudonym)
    taken = set(base["id"])
    lesions, refused = [], []
    for row in _rows(store, sorted(truths)):
        if settings.model_versions is not None and row["model_version"] not in settings.model_versions:
            waiting["other_model"] += 1
            continue
        problem, lesion = _lesion(row, truths[row["id"]], task, known, with_images)
        if lesion is not None and lesion.prediction_id in taken:
            problem = ("duplicate_id", "an id of the base data set")
        if problem is not None or lesion is None:
            refused.append(QuarantinedRow(row["id"], *(problem or ("malformed", ""))))
        else:
            lesions.append(lesion)
    lesions, repeated = _each_picture_once(lesions)
    matched = {lesion.patient_hmac for lesion in lesions} & set(known)
    return LabelledLesions(
        lesions, sorted(refused + repeated), dict(sorted(waiting.items())), None if pseudonym is None else len(matched)
    )


def _truths(store: Store, settings: AddLabels) -> tuple[dict[str, Truth], Counter[str]]:
    wanted = {"agreed", "adjudicated"} | ({"single"} if settings.require == "single" else set())
    until = _LATEST_US if settings.until is None else settings.until
    truths, waiting = {}, Counter()
    for truth in truths_between(store, settings.since or 0, until):
        if truth.state in wanted:
            truths[truth.prediction_id] = truth
        else:
            waiting[{"single": "one_reader"}.get(truth.state, truth.state)] += 1
    return truths, waiting


def _known_patients(base: pd.DataFrame, task: TaskSpec, pseudonym: Pseudonym | None) -> dict[str, str]:
    """Pseudonym -> the base's id of the patient."""
    if pseudonym is None:
        return {}
    column = "group" if task.context_group is None else "context"
    return {pseudonym(str(patient)): str(patient) for patient in base[column].unique() if str(patient)}


def _rows(store: Store, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    names = ("id", "received_at", "patient_hmac", "institution", "image_hash", "model_version", "metadata")
    for start in range(0, len(ids), _CHUNK):
        query = (
            sql.select(*(predictions.c[name] for name in names), images.c.suffix)
            .select_from(predictions.outerjoin(images, images.c.hash == predictions.c.image_hash))
            .where(predictions.c.id.in_(ids[start : start + _CHUNK]))
            .order_by(predictions.c.id)
        )
        with store.reading() as connection:
            yield from (dict(row) for row in connection.execute(query).mappings())


def _lesion(
    row: dict[str, Any], truth: Truth, task: TaskSpec, known: dict[str, str], with_images: bool
) -> tuple[tuple[str, str] | None, LabelledLesion | None]:
    """A reason and what was found, or the lesion."""
    label = _class(truth, task)
    if label is None:
        return ("label_unknown", f"{truth.label!r}; expected one of {task.classes}"), None
    if with_images and row["suffix"] is None:
        return ("image_missing", "its picture is no longer kept"), None
    try:
        metadata = clean_record(task, {name: row["metadata"].get(name) for name in task.columns})
    except ValueError as error:
        return ("metadata_invalid", str(error)), None
    patient = row["patient_hmac"]
    group = row["id"] if patient is None else known.get(patient, patient)
    lesion = LabelledLesion(
        prediction_id=row["id"],
        truth=truth,
        label=label,
        group=group,
        context="" if task.context_group is None or patient is None else group,
        patient_hmac=patient,
        institution=row["institution"],
        received_at=row["received_at"],
        metadata=metadata,
        image=(row["image_hash"], row["suffix"]) if with_images else None,
    )
    return None, lesion


def _class(truth: Truth, task: TaskSpec) -> int | None:
    """The class of that name; of two classes, the one that is as malignant, whatever the experts call it."""
    if truth.label in task.classes:
        return task.classes.index(truth.label)
    if task.num_classes == 2 and truth.malignant is not None:
        return int(task.malignant_mask[1] == truth.malignant)
    return None


def _each_picture_once(lesions: Iterable[LabelledLesion]) -> tuple[list[LabelledLesion], list[QuarantinedRow]]:
    """A picture that was sent twice counts once, as first received; none of it where its labels differ."""
    by_picture: dict[Any, list[LabelledLesion]] = {}
    for lesion in lesions:
        by_picture.setdefault(lesion.image or lesion.prediction_id, []).append(lesion)
    kept, refused = [], []
    for same in by_picture.values():
        first, *others = sorted(same, key=lambda lesion: (lesion.received_at, lesion.prediction_id))
        if len({lesion.label for lesion in same}) > 1:
            detail = "the same picture has labels of different classes"
            refused += [QuarantinedRow(lesion.prediction_id, "conflicting_labels", detail) for lesion in same]
            continue
        kept.append(first)
        detail = f"the same picture as {first.prediction_id}"
        refused += [QuarantinedRow(lesion.prediction_id, "duplicate_picture", detail) for lesion in others]
    return sorted(kept, key=lambda lesion: lesion.prediction_id), refused
