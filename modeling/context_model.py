"""The fusion model of one context as it is served: scaled image logits, plus the boosters' corrections, calibrated.

numpy and LightGBM only; fitting lives in `modeling.metadata_fusion`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeling.calibration import (
    Calibrator,
    ClassScaling,
    apply_to_classes,
    calibrator_from_json,
    log_softmax,
    prior_correction,
)
from modeling.conformal import ConformalSets
from modeling.metadata_features import LOG_PROBABILITY_FLOOR, FeatureSpec
from modeling.operating_points import Thresholds
from modeling.residual_boosting import load_booster, raw_scores
from modeling.schema import Context, TaskSpec

if TYPE_CHECKING:
    import lightgbm

SCHEMA_VERSION = 1


@dataclass
class ContextModel:
    """One context's fusion: image scores and metadata of N lesions to calibrated class probabilities.

    Attributes:
        spec: the features that the boosters read.
        classes: class names (K,).
        malignant_mask: bool (K,).
        scaling: fits the image's log-probabilities to the labels; None in a model without images.
        calibrator: of the risk.
        thresholds: operating points on the risk.
        sets: conformal prediction sets; None in models of before.
        row_prior: class frequencies (K,) in the rows it was fitted on.
        population_prior: class frequencies (K,) where it is used.
        boosters: corrections to the image's logits, averaged; empty when the metadata added nothing out of fold.
        feature_names: columns of the boosters' matrix.
        num_rounds: boosting rounds, by booster.
    """

    spec: FeatureSpec
    classes: list[str]
    malignant_mask: np.ndarray
    scaling: ClassScaling | None
    calibrator: Calibrator
    thresholds: Thresholds
    row_prior: np.ndarray
    population_prior: np.ndarray
    boosters: list[lightgbm.Booster] = field(default_factory=list)
    feature_names: list[str] = field(default_factory=list)
    num_rounds: list[int] = field(default_factory=list)
    sets: ConformalSets | None = None

    @property
    def context(self) -> Context:
        """Which features the model reads: image_only, none or patient."""
        return self.spec.context

    def predict(
        self,
        image_log_probabilities: np.ndarray | None,
        columns: Mapping[str, Sequence] | None = None,
        groups: Sequence | None = None,
        trusted: np.ndarray | None = None,
    ) -> np.ndarray:
        """Calibrated class probabilities.

        Args:
            image_log_probabilities: float (N, K), log_softmax of the network's logits; None only for a model that was
                fitted without images.
            columns: metadata column -> N values; None or absent columns = missing. Not read in "image_only".
            groups: patient ids (N,), needed in "patient" only.
            trusted: bool (N,), whose image scores other lesions of the patient are compared with; None = all.

        Returns:
            float64 (N, K), rows sum to 1; the malignant columns sum to the risk.

        Raises:
            ValueError: image scores of the wrong shape or NaN, groups missing, lengths that differ.
        """
        image = checked_image(image_log_probabilities, len(self.classes), needed=self.scaling is not None)
        corrections: np.ndarray | float = 0.0
        num_rows = 0 if image is None else len(image)
        if self.boosters or image is None:
            matrix, _ = self.spec.build(columns, image, groups, trusted=trusted)
            num_rows = len(matrix)
            scores = [raw_scores(booster, matrix, self.malignant_mask) for booster in self.boosters]
            corrections = sum(scores) / max(len(scores), 1)
        margins = image_margins(self.scaling, self.row_prior, image, num_rows) + corrections
        return to_probabilities(margins, self.malignant_mask, self.calibrator, self.row_prior, self.population_prior)

    def save(self, directory: str | Path) -> None:
        """Writes model.json and booster_<i>.txt into the directory, which is created."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        parameters = {
            "schema_version": SCHEMA_VERSION,
            "context": self.context,
            "classes": self.classes,
            "malignant": [
                name for name, is_malignant in zip(self.classes, self.malignant_mask, strict=True) if is_malignant
            ],
            "features": self.spec.model_dump(),
            "feature_names": self.feature_names,
            "scaling": None if self.scaling is None else self.scaling.model_dump(),
            "num_boosters": len(self.boosters),
            "num_rounds": self.num_rounds,
            "calibration": self.calibrator.to_json(),
            "thresholds": self.thresholds.model_dump(),
            "conformal": None if self.sets is None else self.sets.model_dump(),
            "row_prior": self.row_prior.tolist(),
            "population_prior": self.population_prior.tolist(),
        }
        (directory / "model.json").write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")
        for index, booster in enumerate(self.boosters):
            booster.save_model(directory / f"booster_{index}.txt")

    @classmethod
    def load(cls, directory: str | Path, task: TaskSpec) -> ContextModel:
        """Reads what `save` wrote.

        Raises:
            ValueError: missing or unreadable files, another schema version, or a model of other classes.
        """
        path = Path(directory) / "model.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"fusion model {path} cannot be read: {error}") from error
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema_version {data.get('schema_version')!r}; expected {SCHEMA_VERSION}")
        if data["classes"] != task.classes or set(data["malignant"]) != set(task.malignant):
            raise ValueError(
                f"{path} was fitted for classes {data['classes']}, malignant {data['malignant']}; "
                f"the task has {task.classes}, malignant {task.malignant}"
            )
        return cls(
            spec=FeatureSpec(**data["features"]),
            classes=data["classes"],
            malignant_mask=task.malignant_mask,
            scaling=None if data["scaling"] is None else ClassScaling(**data["scaling"]),
            calibrator=calibrator_from_json(data["calibration"]),
            thresholds=Thresholds(**data["thresholds"]),
            row_prior=np.array(data["row_prior"]),
            population_prior=np.array(data["population_prior"]),
            boosters=[load_booster(path.with_name(f"booster_{i}.txt")) for i in range(data["num_boosters"])],
            feature_names=data["feature_names"],
            num_rounds=data["num_rounds"],
            sets=ConformalSets(**data["conformal"]) if data.get("conformal") else None,
        )


def image_margins(
    scaling: ClassScaling | None, row_prior: np.ndarray, image: np.ndarray | None, num_rows: int
) -> np.ndarray:
    """Log-probabilities float64 (N, K) before any metadata: scaled image scores, or without images the frequencies."""
    if scaling is None or image is None:
        return np.tile(np.log(np.maximum(row_prior, np.exp(LOG_PROBABILITY_FLOOR))), (num_rows, 1))
    return scaling.transform(image)


def to_probabilities(
    margins: np.ndarray,
    malignant_mask: np.ndarray,
    calibrator: Calibrator,
    row_prior: np.ndarray,
    population_prior: np.ndarray,
) -> np.ndarray:
    """Calibrated probabilities float64 (N, K) in the population, from image logits plus corrections (N, K)."""
    probabilities = np.exp(log_softmax(margins))
    risk = calibrator.transform(probabilities[:, malignant_mask].sum(axis=1))
    probabilities = apply_to_classes(probabilities, malignant_mask, risk)
    # A class without rows has no frequency to correct from or to: it keeps its small probability, which is never 0.
    known = row_prior > 0
    return prior_correction(probabilities, np.where(known, row_prior, 1.0), np.where(known, population_prior, 1.0))


def checked_image(image: np.ndarray | None, num_classes: int, needed: bool) -> np.ndarray | None:
    """Image log-probabilities float64 (N, K), floored; None where the model reads none.

    Raises:
        ValueError: missing, of another shape, or NaN.
    """
    if not needed:
        return None
    if image is None:
        raise ValueError("image_log_probabilities are missing; this model reads image scores")
    image = np.asarray(image, dtype=np.float64)
    if image.ndim != 2 or image.shape[1] != num_classes:
        raise ValueError(f"image_log_probabilities have shape {image.shape}; expected (N, {num_classes})")
    if np.isnan(image).any():
        raise ValueError(f"image_log_probabilities hold NaN in {int(np.isnan(image).any(axis=1).sum())} rows")
    return np.maximum(image, LOG_PROBABILITY_FLOOR)
