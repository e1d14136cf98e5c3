"""Splits: a permanent gate split by a hash of the group id, and stratified folds whose groups never span two folds."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

GATE_FOLD = -1
# The greedy assignment can leave a rare class out of a fold; another shuffle usually finds a place for it.
MAX_SHUFFLES = 10


def gate_members(groups: np.ndarray, gate_fraction: float) -> np.ndarray:
    """bool (N,): rows of groups that belong to the gate split.

    Depends on the group id alone, so a patient who is in the gate split stays there in every later dataset version,
    whatever is added or relabelled.

    Args:
        groups: str (N,), patient or lesion ids.
        gate_fraction: expected share of groups, 0-1.
    """
    unique, inverse = np.unique(groups.astype(str), return_inverse=True)
    digests = (hashlib.sha256(group.encode("utf-8")).digest() for group in unique)
    position = np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.float64) / 2.0**64
    return (position < gate_fraction)[inverse]


def assign_folds(
    labels: np.ndarray, groups: np.ndarray, classes: list[str], num_folds: int, gate_fraction: float, seed: int
) -> np.ndarray:
    """Fold of each row, int64 (N,): 0 to num_folds - 1, or -1 for the gate split.

    Args:
        labels: int64 (N,), class indices.
        groups: str (N,); rows of one group get the same fold.
        classes: class names, for messages.
        seed: shuffles the folds; the gate split does not depend on it.

    Raises:
        ValueError: a class of `classes` that occurs in fewer groups outside the gate split than there are folds, or
            that cannot be spread over all folds.
    """
    # Takes a second to import, which every process of a training run would pay for the constant above.
    from sklearn.model_selection import StratifiedGroupKFold

    gate = gate_members(groups, gate_fraction)
    rest = np.flatnonzero(~gate)
    for index, name in enumerate(classes):
        count = len(np.unique(groups[rest][labels[rest] == index]))
        if count < num_folds:
            raise ValueError(
                f"class {name!r} has {count} groups outside the gate split; expected at least {num_folds} (num_folds)"
            )
    for attempt in range(MAX_SHUFFLES):
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed + attempt)
        folds = np.full(len(labels), GATE_FOLD, np.int64)
        for fold, (_, held_out) in enumerate(splitter.split(rest, labels[rest], groups[rest])):
            folds[rest[held_out]] = fold
        counts = class_counts(labels, folds, len(classes), num_folds)
        if (counts > 0).all():
            break
    else:
        fold, index = np.argwhere(counts == 0)[0]
        raise ValueError(
            f"class {classes[index]!r} is missing from fold {fold}: its groups are too few or too unequal for"
            f" num_folds = {num_folds}; use fewer folds"
        )
    return folds


def folds_by_value(
    values: pd.Series, groups: np.ndarray, gate_fraction: float, column: str
) -> tuple[np.ndarray, list[str]]:
    """Leave-one-value-out: every value of a column is a fold, so that each is scored by a model that never saw it.

    Args:
        values: (N,), e.g. the institution; the gate split is taken out first, as always.
        groups: str (N,), for the gate split.
        column: its name, for messages.

    Returns:
        Folds int64 (N,), -1 for the gate split, and their names (the values, in order).

    Raises:
        ValueError: a missing value, or fewer than two values.
    """
    if values.isna().any():
        raise ValueError(
            f"fold_by = {column!r}: {int(values.isna().sum())} rows have no value; expected one in each row"
        )
    text = values.astype(str).to_numpy(str)
    gate = gate_members(groups, gate_fraction)
    names, folds = np.unique(text[~gate], return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"fold_by = {column!r}: {len(names)} values outside the gate split; expected at least 2")
    result = np.full(len(text), GATE_FOLD, np.int64)
    result[~gate] = folds
    return result, names.tolist()


def class_counts(labels: np.ndarray, folds: np.ndarray, num_classes: int, num_folds: int) -> np.ndarray:
    """Rows per fold and class, int64 (num_folds, num_classes), gate split left out."""
    counts = np.zeros((num_folds, num_classes), np.int64)
    inside = folds >= 0
    np.add.at(counts, (folds[inside], labels[inside]), 1)
    return counts


def check_groups(folds: np.ndarray, groups: np.ndarray, fold_names: list[str]) -> None:
    """Refuses folds that share a group (the gate split counts as one): such a leak inflates every metric.

    Raises:
        ValueError: names a group and its folds.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    lowest = np.full(len(names), np.iinfo(np.int64).max)
    highest = np.full(len(names), np.iinfo(np.int64).min)
    np.minimum.at(lowest, inverse, folds)
    np.maximum.at(highest, inverse, folds)
    split = np.flatnonzero(lowest != highest)
    if len(split):
        first = split[0]
        where = ["gate" if fold == GATE_FOLD else fold_names[fold] for fold in (lowest[first], highest[first])]
        raise ValueError(
            f"{len(split)} groups span two folds, e.g. {str(names[first])!r} lies in {where[0]!r} and {where[1]!r};"
            " expected every group in one"
        )
