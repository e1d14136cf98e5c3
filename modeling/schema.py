"""What a data set is: columns, classes, groups, and the columns that must never become features.

A task is described by data, not by code: the same jobs run ISIC 2024 (binary, one label column), HAM10000
(seven classes) and ISIC 2019 (one-hot columns).
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

# Columns that give the label away or do not exist when a lesion is scored. `dx_type` tells: follow_up is always nv.
# The last two lines: what the ISIC archive's own export, ISIC 2020 and PAD-UFES-20 call diagnosis and biopsy.
LEAK_COLUMNS = frozenset(
    {"lesion_id", "dx_type", "mel_mitotic_index", "mel_thick_mm", "tbp_lv_dnn_lesion_confidence", "iddx_full"}
    | {f"iddx_{i}" for i in range(1, 6)}
    | {"diagnosis", "diagnosis_confirm_type", "benign_malignant", "melanocytic", "mel_class", "mel_type", "mel_ulcer"}
    | {f"diagnosis_{i}" for i in range(1, 6)}
    | {"nevus_type", "concomitant_biopsy", "biopsed"}
)

CONTEXTS = ("image_only", "none", "patient")
Context = Literal["image_only", "none", "patient"]


class ColumnSpec(BaseModel):
    """One metadata column that may be a feature.

    `minimum`/`maximum` bound numeric values (inclusive); `categories` bounds categorical ones. Both are optional.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["numeric", "categorical"] = "numeric"
    minimum: float | None = None
    maximum: float | None = None
    categories: list[str] | None = None

    @model_validator(mode="after")
    def _bounds_fit_the_kind(self) -> ColumnSpec:
        if self.kind == "categorical" and (self.minimum is not None or self.maximum is not None):
            raise ValueError("minimum and maximum belong to numeric columns")
        if self.kind == "numeric" and self.categories is not None:
            raise ValueError("categories belong to categorical columns")
        return self


class TaskSpec(BaseModel):
    """A data set's columns and classes.

    Attributes:
        name: short name, also the data set's directory name.
        synthetic: True when images and labels were generated; shown on every page and answer.
        id_column: unique lesion image id, the HDF5 key.
        fold_group: column whose groups never span two folds (patient or lesion).
        context_group: column whose rows form one patient's context; None where no patient id is published.
        label_column: the column that holds the label, or
        label_columns: one-hot columns, in the order of `classes`.
        label_values: raw values of `label_column` in the order of `classes`; default: the class names.
        classes: class names; index = network output.
        malignant: classes whose probabilities add up to the risk.
        columns: metadata features by column name.
        site_column: body-site column for within patient x site ranks.
        institution_column: source institution, for reports only.
        subgroup_columns: columns the evaluation reports on.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    synthetic: bool = False
    id_column: str = "isic_id"
    fold_group: str
    context_group: str | None = None
    label_column: str | None = None
    label_columns: list[str] | None = None
    label_values: list[str] | None = None
    classes: list[str] = Field(min_length=2)
    malignant: list[str] = Field(min_length=1)
    columns: dict[str, ColumnSpec] = Field(default_factory=dict)
    site_column: str | None = None
    institution_column: str | None = None
    subgroup_columns: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        if (self.label_column is None) == (self.label_columns is None):
            raise ValueError("give exactly one of label_column and label_columns")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {self.classes} repeat a name")
        unknown = [name for name in self.malignant if name not in self.classes]
        if unknown:
            raise ValueError(f"malignant classes {unknown} are not in classes {self.classes}")
        if len(set(self.malignant)) == len(self.classes):
            raise ValueError("at least one class must not be malignant")
        if self.label_values is not None and len(self.label_values) != len(self.classes):
            raise ValueError(f"label_values has {len(self.label_values)} entries for {len(self.classes)} classes")
        if self.label_columns is not None and len(self.label_columns) != len(self.classes):
            raise ValueError(f"label_columns has {len(self.label_columns)} entries for {len(self.classes)} classes")
        leaks = sorted(LEAK_COLUMNS & set(self.columns))
        if leaks:
            raise ValueError(f"columns {leaks} leak the label or are missing at serving time; they cannot be features")
        own = {self.id_column, self.fold_group, self.context_group, self.label_column, *(self.label_columns or [])}
        clash = sorted(own & set(self.columns))
        if clash:
            raise ValueError(f"columns {clash} are ids or labels; they cannot be features")
        if self.site_column is not None and self.site_column not in self.columns:
            raise ValueError(f"site_column {self.site_column!r} is not among columns")
        return self

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def malignant_mask(self) -> np.ndarray:
        """bool (num_classes,): which network outputs add up to the risk."""
        return np.array([name in self.malignant for name in self.classes])

    @property
    def numeric_columns(self) -> list[str]:
        return [name for name, spec in self.columns.items() if spec.kind == "numeric"]

    @property
    def categorical_columns(self) -> list[str]:
        return [name for name, spec in self.columns.items() if spec.kind == "categorical"]

    @property
    def contexts(self) -> list[Context]:
        """Contexts a model of this task can be asked in; `patient` needs a context group."""
        names: list[Context] = ["image_only"]
        if self.columns:
            names.append("none")
            if self.context_group is not None:
                names.append("patient")
        return names

    @property
    def tabular_contexts(self) -> list[Context]:
        """Contexts of a model that sees metadata alone."""
        return [name for name in self.contexts if name != "image_only"]
