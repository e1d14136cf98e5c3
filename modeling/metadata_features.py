"""Feature matrix of a lesion: own metadata, image scores, and how the lesion stands out among its patient's lesions.

The "ugly duckling" features need all of a patient's lesions: z-score and percentile rank of every numeric column and of
the image score within the patient, and within the patient's body site. They only ever read rows of the same patient.
One implementation serves training, batch scoring and single requests; numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from modeling.patient_relative import group_codes, is_missing, percentile_ranks, z_scores
from modeling.schema import CONTEXTS, Context, TaskSpec

# exp(-15) = 3e-7: log-probabilities below that differ by float noise, not by evidence.
LOG_PROBABILITY_FLOOR = -15.0
# Keeps absurd but finite inputs, and their squares and ratios, finite.
_LARGEST = 1e30

_Formula = Callable[..., np.ndarray]

# Ratios and contrasts that won on ISIC 2024, computed where a task has the columns they read.
DERIVED: dict[str, tuple[tuple[str, ...], _Formula]] = {
    "size_ratio": (("tbp_lv_minorAxisMM", "clin_size_long_diam_mm"), lambda minor, long: minor / long),
    "shape_index": (("tbp_lv_areaMM2", "tbp_lv_perimeterMM"), lambda area, perimeter: area / perimeter**2),
    "perimeter_to_area": (("tbp_lv_perimeterMM", "tbp_lv_areaMM2"), lambda perimeter, area: perimeter / area),
    "size_for_age": (("clin_size_long_diam_mm", "age_approx"), lambda size, age: size / age),
    "a_ratio": (("tbp_lv_A", "tbp_lv_Aext"), lambda inside, outside: inside / outside),
    "b_ratio": (("tbp_lv_B", "tbp_lv_Bext"), lambda inside, outside: inside / outside),
    "chroma_ratio": (("tbp_lv_C", "tbp_lv_Cext"), lambda inside, outside: inside / outside),
    "hue_contrast": (("tbp_lv_H", "tbp_lv_Hext"), lambda inside, outside: inside - outside),
    "lightness_ratio": (("tbp_lv_L", "tbp_lv_Lext"), lambda inside, outside: inside / outside),
    "lightness_variation_ratio": (("tbp_lv_stdL", "tbp_lv_stdLExt"), lambda inside, outside: inside / outside),
    "color_difference": (
        ("tbp_lv_deltaL", "tbp_lv_deltaA", "tbp_lv_deltaB"),
        lambda lightness, a, b: np.sqrt(lightness**2 + a**2 + b**2),
    ),
    "color_uniformity": (
        ("tbp_lv_color_std_mean", "tbp_lv_radial_color_std_max"),
        lambda mean, radial: mean / radial,
    ),
    "color_by_lightness_variation": (("tbp_lv_color_std_mean", "tbp_lv_stdLExt"), lambda color, std: color / std),
    "border_complexity": (("tbp_lv_norm_border", "tbp_lv_symm_2axis"), lambda border, asymmetry: border + asymmetry),
    "border_asymmetry": (("tbp_lv_norm_border", "tbp_lv_symm_2axis"), lambda border, asymmetry: border * asymmetry),
    "border_color": (("tbp_lv_norm_border", "tbp_lv_norm_color"), lambda border, color: border * color),
    "visibility": (("tbp_lv_deltaLBnorm", "tbp_lv_norm_color"), lambda contrast, color: contrast + color),
    "size_for_contrast": (("clin_size_long_diam_mm", "tbp_lv_deltaLBnorm"), lambda size, contrast: size / contrast),
    "skin_tone_ita": (
        ("tbp_lv_Lext", "tbp_lv_Bext"),
        lambda lightness, b: np.degrees(np.arctan2(lightness - 50.0, b)),
    ),
}


def _category(value: Any) -> str | None:
    """A category's name: text as it is, whole numbers without their decimal point, missing as None."""
    if isinstance(value, str):
        return value or None
    if is_missing(value):
        return None
    return str(int(value)) if isinstance(value, (float, np.floating)) and float(value).is_integer() else str(value)


def _numbers(values: Sequence) -> np.ndarray:
    """float64 (N,), limited to ±1e30; missing and infinite as NaN."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array([np.nan if is_missing(value) else float(value) for value in values], dtype=np.float64)
    return np.where(np.isfinite(numbers), np.clip(numbers, -_LARGEST, _LARGEST), np.nan)


class FeatureSpec(BaseModel):
    """Which features a fusion model reads, in order: JSON-ready, part of the bundle.

    Attributes:
        context: "image_only" (no features), "none" (the lesion itself) or "patient" (plus patient-relative).
        numeric: numeric columns.
        categories: categorical column -> known values; a feature's value is the position in this list.
        derived: names of `DERIVED` features.
        site_column: body site for ranks within patient and site.
        malignant: per class, whether it adds to the risk; None when the model sees no image.
    """

    model_config = ConfigDict(extra="forbid")

    context: Context
    numeric: list[str] = []
    categories: dict[str, list[str]] = {}
    derived: list[str] = []
    site_column: str | None = None
    malignant: list[bool] | None = None

    @field_validator("derived")
    @classmethod
    def _known(cls, derived: list[str]) -> list[str]:
        unknown = [name for name in derived if name not in DERIVED]
        if unknown:
            raise ValueError(f"derived features {unknown} are unknown to this version")
        return derived

    @classmethod
    def fit(
        cls, context: Context, task: TaskSpec, columns: Mapping[str, Sequence], has_image: bool = True
    ) -> FeatureSpec:
        """The features of a task: known categories come from the task, or else from these columns' values."""
        if context not in CONTEXTS:
            raise ValueError(f"context is {context!r}; expected one of {list(CONTEXTS)}")
        malignant = task.malignant_mask.tolist() if has_image else None
        if context == "image_only":
            return cls(context=context, malignant=malignant)
        numeric = task.numeric_columns
        categories = {}
        for name in task.categorical_columns:
            listed = task.columns[name].categories
            values = np.asarray(columns[name], dtype=object) if listed is None and name in columns else []
            seen = {_category(value) for value in values} - {None}
            categories[name] = sorted(seen) if listed is None else list(listed)
        return cls(
            context=context,
            numeric=numeric,
            categories=categories,
            derived=[name for name, (needs, _) in DERIVED.items() if set(needs) <= set(numeric)],
            site_column=task.site_column,
            malignant=malignant,
        )

    @property
    def categorical_features(self) -> list[int]:
        """Positions of the categorical features in the matrix."""
        return list(range(len(self.numeric), len(self.numeric) + len(self.categories)))

    @property
    def num_relative(self) -> int:
        """How many features, the last of the matrix, compare a lesion with others of its patient."""
        if self.context != "patient":
            return 0
        scopes = 2 if self.site_column in self.categories else 1
        return scopes * 2 * (len(self.numeric) + (self.malignant is not None))

    def build(
        self,
        columns: Mapping[str, Sequence] | None,
        image_log_probabilities: np.ndarray | None,
        groups: Sequence | None = None,
        context: Context | None = None,
        trusted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[str]]:
        """Builds the features of N lesions.

        Args:
            columns: column -> N values (lists, arrays or a data frame); absent columns are missing throughout, extra
                ones are ignored. None = no metadata.
            image_log_probabilities: float (N, K), needed when the spec was fitted with images.
            groups: patient ids (N,), needed in context "patient"; rows without an id stand alone.
            context: must equal the spec's; given by callers that hold several specs.
            trusted: bool (N,), whose image scores other lesions of the patient are compared with; None = all. The
                others' own image scores are compared with nothing (NaN); their metadata count as all others' do.

        Returns:
            (matrix float32 (N, F), feature names (F,)). Missing values and unseen categories are NaN.

        Raises:
            ValueError: another context, or image scores, groups or rows missing.
        """
        if context is not None and context != self.context:
            raise ValueError(f"context is {context!r}; these features were fitted for {self.context!r}")
        columns = {} if columns is None else columns
        num_rows = self._num_rows(columns, image_log_probabilities, groups)
        return self.assemble(self.encode(columns, num_rows), image_log_probabilities, groups, trusted)

    def encode(self, columns: Mapping[str, Sequence], num_rows: int) -> np.ndarray:
        """The lesions' own metadata as numbers: float64 (N, numeric + categorical columns), NaN = missing or unseen."""
        encoded = np.full((num_rows, len(self.numeric) + len(self.categories)), np.nan)
        for position, name in enumerate(self.numeric):
            if name in columns:
                encoded[:, position] = _numbers(columns[name])
        for position, (name, known) in enumerate(self.categories.items(), start=len(self.numeric)):
            if name in columns:
                index = {category: float(i) for i, category in enumerate(known)}
                values = np.asarray(columns[name], dtype=object)
                encoded[:, position] = [index.get(_category(value), np.nan) for value in values]
        return encoded

    def assemble(
        self,
        encoded: np.ndarray,
        image_log_probabilities: np.ndarray | None,
        groups: Sequence | None = None,
        trusted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[str]]:
        """`build` from the result of `encode`: (matrix float32 (N, F), feature names (F,))."""
        numbers = encoded[:, : len(self.numeric)]
        blocks, names = [encoded], [*self.numeric, *self.categories]
        if self.derived:
            blocks.append(self._derived(numbers))
            names += self.derived
        image_score = np.empty((len(encoded), 0))
        if self.malignant is not None:
            log_probabilities, image_score = self._image_features(image_log_probabilities)
            blocks += [image_score, log_probabilities]
            names += [
                "image_malignant_logit",
                *(f"image_log_probability_{c}" for c in range(log_probabilities.shape[1])),
            ]
        if self.context == "patient":
            compared = image_score if trusted is None else np.where(trusted[:, None], image_score, np.nan)
            relative = np.concatenate([numbers, compared], axis=1)
            relative_names = [*self.numeric, *(["image_malignant_logit"] if self.malignant is not None else [])]
            for scope, codes in self._scopes(encoded, groups).items():
                blocks += [z_scores(relative, codes), percentile_ranks(relative, codes)]
                names += [f"{scope}_z_{name}" for name in relative_names]
                names += [f"{scope}_rank_{name}" for name in relative_names]
        return np.clip(np.concatenate(blocks, axis=1), -_LARGEST, _LARGEST).astype(np.float32), names

    def _scopes(self, encoded: np.ndarray, groups: Sequence) -> dict[str, np.ndarray]:
        """Group codes (N,) of the rows each lesion is compared with: its patient's, and those on the same site."""
        patients = group_codes(groups)
        if self.site_column not in self.categories:
            return {"patient": patients}
        site = encoded[:, len(self.numeric) + list(self.categories).index(self.site_column)]
        # A missing site counts as a site of its own within the patient.
        site_codes = np.nan_to_num(site, nan=-1.0).astype(np.int64) + 1
        return {"patient": patients, "site": patients * (len(self.categories[self.site_column]) + 1) + site_codes}

    def _num_rows(self, columns: Mapping, image: np.ndarray | None, groups: Sequence | None) -> int:
        if self.malignant is not None and image is None:
            raise ValueError("image_log_probabilities are missing; this model reads image scores")
        if self.context == "patient" and groups is None:
            raise ValueError("groups are missing; patient-relative features need every lesion's patient")
        lengths = {name: len(columns[name]) for name in (*self.numeric, *self.categories) if name in columns}
        lengths |= {} if image is None else {"image_log_probabilities": len(image)}
        lengths |= {} if groups is None else {"groups": len(groups)}
        if not lengths:
            raise ValueError("neither columns nor image scores were given; the number of lesions is unknown")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns, image scores and groups differ in length: {lengths}")
        return next(iter(lengths.values()))

    def _derived(self, numbers: np.ndarray) -> np.ndarray:
        position = {name: i for i, name in enumerate(self.numeric)}
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            features = [DERIVED[name][1](*(numbers[:, position[c]] for c in DERIVED[name][0])) for name in self.derived]
        stacked = np.stack(features, axis=1)
        return np.where(np.isfinite(stacked), stacked, np.nan)

    def _image_features(self, image_log_probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log-probabilities (N, K), or (N, 0) for two classes where the logit says it all; malignant logit (N, 1))."""
        values = np.maximum(np.asarray(image_log_probabilities, dtype=np.float64), LOG_PROBABILITY_FLOOR)
        malignant = np.array(self.malignant)
        score = np.logaddexp.reduce(values[:, malignant], axis=1) - np.logaddexp.reduce(values[:, ~malignant], axis=1)
        return values if values.shape[1] > 2 else values[:, :0], score[:, None]
