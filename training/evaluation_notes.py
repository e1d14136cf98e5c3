"""What the data cannot show, in sentences: which figures are null and why, and which columns taught a model nothing.

They stand beside the figures, in the report and in the model card, because a null alone explains itself to nobody.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_pipelines.data_checks import CheckLimits, constant_columns, telling_columns
from data_pipelines.image_dataset import DatasetVersion
from modeling.patient_relative import group_codes
from modeling.resampling import MIN_GROUPS, enough_groups
from modeling.schema import Context


def check_trainable(version: DatasetVersion) -> None:
    """Refuses, before any network trains, a data set of which no model can be fitted or none measured.

    Raises:
        ValueError: an empty gate split, fewer than two folds with rows, or training rows that are all malignant or all
            benign.
    """
    training, gate = version.training_positions, version.gate_positions
    malignant = version.task.malignant_mask[version.lesions["label"].to_numpy(np.int64)[training]]
    folds = version.lesions["fold"].to_numpy()[training]
    where = f"dataset {version.path}:"
    if len(gate) == 0:
        raise ValueError(
            f"{where} its gate split has no row, and nothing else measures a model; expected at least one (prepare it"
            " with a larger gate_fraction)"
        )
    if len(np.unique(folds)) < 2:
        raise ValueError(f"{where} {len(np.unique(folds))} folds have rows; expected at least 2 outside the gate split")
    if malignant.all() or not malignant.any():
        raise ValueError(
            f"{where} {int(malignant.sum())} of its {len(training)} training rows are malignant; expected malignant"
            " and benign ones"
        )


def evaluation_notes(version: DatasetVersion, context: Context, prevalence: float | None = None) -> list[str]:
    """Sentences about one context's evaluation, the gravest first; empty where there is nothing to say.

    Args:
        version: gate split and training rows are looked at, labels of the gate split only to count them.
        prevalence: share of malignant lesions that risks are for; None = that of the data.
        context: the columns matter to those that read metadata, the patients to "patient".
    """
    gate = version.lesions.iloc[version.gate_positions]
    train = version.lesions.iloc[version.training_positions]
    notes = _class_notes(version, gate, train) + _group_notes(version, gate)
    if prevalence is not None:
        notes.append(
            f"Risks, net benefit and lesions per cancer are for {prevalence:g} malignant lesions in 1, which the gate "
            "split does not have: its calibration error and intercept are null."
        )
    if context != "image_only":
        notes += _column_notes(version, train)
    if context == "patient":
        # A lesion without a patient's id stands alone as well.
        sizes = train.loc[train["context"] != "", "context"].value_counts()
        if (sizes == 1).all():
            notes.append("Every patient has one training lesion: comparing it with the patient's others tells nothing.")
    return notes


def _class_notes(version: DatasetVersion, gate: pd.DataFrame, train: pd.DataFrame) -> list[str]:
    task, notes = version.task, []
    for place, rows, lost in (
        ("The gate split", gate, "its AUC, pAUC and {} are null, as is every gain measured on it."),
        *(
            (f"Fold {fold}", train[train["fold"] == fold], "its AUC and pAUC are null.")
            for fold in version.training_folds
        ),
    ):
        malignant = task.malignant_mask[rows["label"].to_numpy(np.int64)]
        for kind, measure, count in (
            ("malignant", "sensitivity", malignant.sum()),
            ("benign", "specificity", (~malignant).sum()),
        ):
            if count == 0:
                notes.append(f"{place} ({len(rows)} lesions) holds no {kind} lesion: {lost.format(measure)}")
    if task.num_classes > 2:
        for index, name in enumerate(task.classes):
            if not (train["label"] == index).any():
                notes.append(
                    f"No training lesion is of class {name}: the model cannot recognise it; its probability is near 0."
                )
            if not (gate["label"] == index).any():
                notes.append(f"The gate split holds no lesion of class {name}: its recall is null.")
    return notes


def _group_notes(version: DatasetVersion, gate: pd.DataFrame) -> list[str]:
    malignant = version.task.malignant_mask[gate["label"].to_numpy(np.int64)]
    if malignant.all() or not malignant.any() or enough_groups(malignant, gate["group"]):
        return []
    counts = [len(np.unique(group_codes(gate["group"])[rows])) for rows in (malignant, ~malignant)]
    return [
        f"The gate split's malignant lesions are of {counts[0]} groups by {version.task.fold_group}, the benign ones "
        f"of {counts[1]}: with fewer than {MIN_GROUPS} of either, intervals are null."
    ]


def _column_notes(version: DatasetVersion, train: pd.DataFrame) -> list[str]:
    columns, notes = list(version.task.columns), []
    empty = [name for name in columns if train[name].isna().all()]
    constant = constant_columns(train, columns)
    if empty:
        notes.append(f"Columns without a value in any training lesion tell nothing: {', '.join(empty)}.")
    if constant:
        notes.append(f"Columns with one value in all training lesions tell nothing: {', '.join(constant)}.")
    malignant = version.task.malignant_mask[train["label"].to_numpy(np.int64)]
    for name, score in telling_columns(train, columns, malignant, CheckLimits().warn_single_auc).items():
        notes.append(f"Column {name} alone tells malignant from benign with AUC {score:.3f}: it may leak the label.")
    return notes
