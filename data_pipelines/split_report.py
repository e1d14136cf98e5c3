"""What a dataset version holds, split by split: rows, malignant lesions, patients and institutions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from data_pipelines.metadata_table import QuarantinedRow
from data_pipelines.stratified_folds import GATE_FOLD
from modeling.schema import TaskSpec


def split_report(
    table: pd.DataFrame, quarantine: list[QuarantinedRow], task: TaskSpec, fold_names: list[str]
) -> dict[str, Any]:
    """The content of report.json: for the gate split and every fold rows, malignant lesions, groups, patients (None
    without a context group), class counts and rows per institution (None without an institution column)."""
    parts = {"gate": GATE_FOLD} | {name: fold for fold, name in enumerate(fold_names)}
    malignant = task.malignant_mask[table["label"].to_numpy(np.int64)]
    splits = {}
    for name, fold in parts.items():
        rows = table[table["fold"] == fold]
        splits[name] = {
            "rows": len(rows),
            "malignant": int(malignant[rows.index].sum()),
            "groups": int(rows["group"].nunique()),
            "patients": int(rows["context"].nunique()) if task.context_group is not None else None,
            "class_counts": class_counts(rows["label"], task),
            "institutions": _counts(rows, task.institution_column),
        }
    return {
        "task": task.name,
        "synthetic": task.synthetic,
        "rows": len(table),
        "groups": int(table["group"].nunique()),
        "group_column": task.fold_group,
        "quarantined": dict(Counter(row.reason for row in quarantine)),
        "splits": splits,
        "missing_values": {name: int(table[name].isna().sum()) for name in task.columns},
    }


def added_summary(table: pd.DataFrame, task: TaskSpec) -> dict[str, Any]:
    """What a version's own table tells of its added rows (column `added`): how many, of which classes, and the shares
    of the classes beside the base's."""
    own = table["added"].to_numpy(bool)
    counts, of_base = class_counts(table["label"][own], task), class_counts(table["label"][~own], task)
    return {
        "rows": int(own.sum()),
        "class_counts": counts,
        "class_shares": _shares(counts),
        "base_class_shares": _shares(of_base),
    }


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: round(count / total, 6) if total else 0.0 for name, count in counts.items()}


def _counts(rows: pd.DataFrame, column: str | None) -> dict[str, int] | None:
    if column is None:
        return None
    return {str(name): int(count) for name, count in rows[column].fillna("(missing)").value_counts().items()}


def report_lines(report: dict[str, Any]) -> list[str]:
    """One line per split: what a reader checks before training."""
    lines = []
    for name, part in report["splits"].items():
        patients = "" if part["patients"] is None else f", {part['patients']} patients"
        groups = f", {part['groups']} groups by {report['group_column']}"
        institutions = "" if part["institutions"] is None else f", {len(part['institutions'])} institutions"
        lines.append(f"{name}: {part['rows']} rows, {part['malignant']} malignant{groups}{patients}{institutions}")
    for reason, count in sorted(report["quarantined"].items()):
        lines.append(f"quarantined: {count} {reason}")
    return lines


def class_counts(labels: pd.Series, task: TaskSpec) -> dict[str, int]:
    """Rows of each class, by name."""
    return {name: int((labels == index).sum()) for index, name in enumerate(task.classes)}
