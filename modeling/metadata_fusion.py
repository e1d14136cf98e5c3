"""Fusion of image scores and metadata into calibrated class probabilities, one model per context.

A model is a short sum of logits. The image's class log-probabilities are scaled to the labels (`ClassScaling`); boosted
trees, which see metadata and image scores, add corrections to them (they start from the image's prediction, LightGBM's
`init_score`); the sum's risk is calibrated. The number of boosting rounds is the one with the lowest cross-fitted log
loss of its kind of trees, and none is allowed, so that on little data fusion falls back to the image alone instead of
below it. Kinds of trees that gain are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.calibration import CALIBRATORS, ClassScaling, log_softmax
from modeling.conformal import ConformalSets
from modeling.context_model import ContextModel, checked_image, image_margins, to_probabilities
from modeling.metadata_features import FeatureSpec
from modeling.operating_points import choose_thresholds
from modeling.patient_relative import group_codes
from modeling.residual_boosting import MANY_ROWS, finish, grow, leave_out_at_random, raw_scores, start_booster
from modeling.schema import Context, TaskSpec

if TYPE_CHECKING:
    import lightgbm

__all__ = ["ContextModel", "FusionConfig", "fit_context_model"]

# Rounds are chosen on this grid (finer steps only follow noise), up to the first time that many bring no gain.
_ROUND_STEP, _PATIENCE = 5, 30


class BoosterConfig(BaseModel):
    """One kind of boosted trees."""

    model_config = ConfigDict(extra="forbid")

    num_bags: int = Field(default=2, ge=1, description="boosters of this kind, averaged over seeds")
    relative: bool = Field(default=True, description="read the patient-relative features, in the context that has them")
    learning_rate: float = Field(default=0.08, gt=0, le=1)
    num_leaves: int = Field(default=8, ge=2)
    max_bin: int = Field(default=63, ge=2, description="half the time of 255 for the same score")
    min_data_in_leaf: int = Field(default=20, ge=1)
    min_sum_hessian_in_leaf: float = Field(default=1.0, ge=0, description="keeps rare classes from leaves of a row")
    lambda_l2: float = Field(default=5.0, ge=0)
    feature_fraction: float = Field(default=0.5, gt=0, le=1)
    bagging_fraction: float = Field(default=0.8, gt=0, le=1)

    def lightgbm_parameters(self, seed: int, num_threads: int) -> dict[str, Any]:
        """LightGBM's parameters for a booster of this kind."""
        other = {"bagging_freq": 1, "seed": seed, "num_threads": num_threads}
        return self.model_dump(exclude={"num_bags", "relative"}) | other


SMALL_TREES = BoosterConfig()
LARGE_TREES = BoosterConfig(num_leaves=31, lambda_l2=0.0)
# Averages of unlike trees rank better than those of like ones: see docs/results.md. "Own" ones read no other lesion.
UNLIKE_TREES = (
    SMALL_TREES,
    SMALL_TREES.model_copy(update={"relative": False}),
    LARGE_TREES,
    LARGE_TREES.model_copy(update={"relative": False, "feature_fraction": 1.0}),
)


class FusionConfig(BaseModel):
    """How the fusion of image and metadata is trained."""

    model_config = ConfigDict(extra="forbid")

    boosters: tuple[BoosterConfig, ...] = Field(default=UNLIKE_TREES, min_length=1)
    num_boost_round: int = Field(default=300, ge=0, description="most rounds; the best number is chosen out of fold")
    num_threads: int = Field(default=0, ge=0, description="while training; 0: all cores, but one for few rows")
    masked_rows: float = Field(default=0.1, ge=0, le=1, description="share of rows trained with metadata left out")
    calibration: Literal["platt", "isotonic"] = "platt"
    sensitivities: tuple[float, ...] = (0.8, 0.9, 0.95)
    operating_sensitivity: float = Field(default=0.95, gt=0, le=1)
    conformal_error: float = Field(default=0.1, gt=0, lt=1, description="share of a class whose sets may lack it")


def fit_context_model(
    context: Context,
    task: TaskSpec,
    image_log_probabilities: np.ndarray | None,
    columns: Mapping[str, Sequence] | None,
    labels: np.ndarray,
    groups: Sequence | None,
    folds: np.ndarray,
    config: FusionConfig,
    sampling_prior: Sequence[float],
    population_prior: Sequence[float] | None,
    seed: int,
) -> tuple[ContextModel, np.ndarray]:
    """Fits one context's model on out-of-fold image scores.

    Args:
        context: which features it may read.
        task: classes and columns.
        image_log_probabilities: out-of-fold log_softmax of the network's logits (N, K); None fits on metadata alone.
        columns: metadata column -> N values; not read in "image_only".
        labels: class indices int (N,).
        groups: patient ids (N,) for context "patient".
        folds: fold of each row int (N,), at least two; no patient may span two folds.
        config: boosting and calibration settings.
        sampling_prior: class frequencies (K,) in the network's training sample.
        population_prior: class frequencies (K,) where the model is used; None = those of these rows.
        seed: of bagging, feature sampling and masking. Same inputs and seed give the same model.

    Returns:
        (model, out-of-fold probabilities float64 (N, K)). Scaling and boosters of those are cross-fitted; the final
        two-parameter risk calibration and the thresholds were fitted on them.

    Raises:
        ValueError: fewer than two folds, labels out of range, or no malignant or no benign row.
    """
    labels, folds = np.asarray(labels, dtype=np.int64), np.asarray(folds, dtype=np.int64)
    columns = {} if columns is None else columns
    _check_rows(labels, folds, task)
    if context == "patient":
        _check_patients(groups, folds)
    image = checked_image(image_log_probabilities, task.num_classes, needed=image_log_probabilities is not None)
    row_prior = np.bincount(labels, minlength=task.num_classes) / len(labels)
    sampling = _checked_prior("sampling_prior", sampling_prior, task)
    population = row_prior if population_prior is None else _checked_prior("population_prior", population_prior, task)

    def scaled_image(rows: np.ndarray) -> tuple[ClassScaling | None, np.ndarray]:
        """Image scaling fitted on some rows (bool (N,)), and the logits (N, K) it gives all rows."""
        scaling = None if image is None else ClassScaling.fit(image[rows], labels[rows], sampling, row_prior)
        return scaling, image_margins(scaling, row_prior, image, len(labels))

    held_out = [folds == fold for fold in np.unique(folds)]
    starts = [scaled_image(~rows)[1] for rows in held_out]
    margins = np.select([rows[:, None] for rows in held_out], starts)
    every_row = np.ones(len(labels), dtype=bool)
    scaling, final_start = scaled_image(every_row)

    spec = FeatureSpec.fit(context, task, columns, has_image=image is not None)
    trees: dict[str, Any] = {}
    if context != "image_only":
        encoded = spec.encode(columns, len(labels))
        matrix, names = spec.assemble(encoded, image, groups)

        def boosters(kind: int, bag: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> list[lightgbm.Booster]:
            """One bag's boosters of a kind, one per part: (logits (N, K) to start from, bool (N,) rows to train on)."""
            rng = np.random.default_rng([seed, kind, bag])
            parameters = config.boosters[kind].lightgbm_parameters(int(rng.integers(2**31)), num_threads)
            masked, _ = spec.assemble(leave_out_at_random(encoded, config.masked_rows, rng), image, groups)
            if not config.boosters[kind].relative:
                # No split is found in a column without values.
                masked[:, masked.shape[1] - spec.num_relative :] = np.nan
            common = (task.malignant_mask, spec.categorical_features, parameters)
            return [start_booster(masked[rows], start[rows], labels[rows], *common) for start, rows in parts]

        num_threads = config.num_threads or (1 if len(labels) < MANY_ROWS else len(os.sched_getaffinity(0)))
        fold_parts = [(start, ~rows) for start, rows in zip(starts, held_out, strict=True)]
        final, num_rounds, corrections = [], [], np.zeros_like(margins)
        for kind, bags in enumerate(range(settings.num_bags) for settings in config.boosters):
            folded = [boosters(kind, bag, fold_parts) for bag in bags]
            best, logits = _choose_rounds(folded, held_out, matrix, margins, labels, task, config.num_boost_round)
            if best == 0:
                continue
            for bag in bags:
                booster = boosters(kind, bag, [(final_start, every_row)])[0]
                grow(booster, best)
                final.append(finish(booster))
                num_rounds.append(best)
            corrections += len(bags) * (logits - margins)
        # Log loss is convex in the logits: the mean of the kinds is no worse than their losses' mean.
        margins = margins + corrections / max(len(final), 1)
        trees = {"boosters": final, "feature_names": names, "num_rounds": num_rounds}

    probabilities = np.exp(log_softmax(margins))
    malignant = task.malignant_mask[labels]
    calibrator = CALIBRATORS[config.calibration].fit(probabilities[:, task.malignant_mask].sum(axis=1), malignant)
    calibrated = to_probabilities(margins, task.malignant_mask, calibrator, row_prior, population)
    risk = calibrated[:, task.malignant_mask].sum(axis=1)
    model = ContextModel(
        spec=spec,
        classes=list(task.classes),
        malignant_mask=task.malignant_mask,
        scaling=scaling,
        calibrator=calibrator,
        thresholds=choose_thresholds(malignant, risk, config.sensitivities, config.operating_sensitivity, groups),
        sets=ConformalSets.fit(calibrated, labels, config.conformal_error),
        row_prior=row_prior,
        population_prior=population,
        **trees,
    )
    return model, calibrated


def _checked_prior(name: str, prior: Sequence[float], task: TaskSpec) -> np.ndarray:
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (task.num_classes,) or not (np.isfinite(values) & (values >= 0)).all() or values.sum() <= 0:
        raise ValueError(f"{name} is {values.tolist()}; expected {task.num_classes} non-negative class frequencies")
    return values / values.sum()


def _check_rows(labels: np.ndarray, folds: np.ndarray, task: TaskSpec) -> None:
    if labels.shape != folds.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and folds {folds.shape} must be vectors of the same length")
    if len(np.unique(folds)) < 2:
        raise ValueError(f"folds hold {len(np.unique(folds))} distinct values; cross-fitting needs at least 2")
    if labels.min() < 0 or labels.max() >= task.num_classes:
        raise ValueError(f"labels range from {labels.min()} to {labels.max()}; expected 0 to {task.num_classes - 1}")
    malignant = int(task.malignant_mask[labels].sum())
    if malignant in (0, len(labels)):
        raise ValueError(f"{malignant} of {len(labels)} lesions are malignant; fusion needs malignant and benign ones")


def _check_patients(groups: Sequence | None, folds: np.ndarray) -> None:
    codes = group_codes(groups if groups is not None else [None] * len(folds))
    first = np.zeros(int(codes.max()) + 1, dtype=folds.dtype)
    first[codes[::-1]] = folds[::-1]
    apart = np.flatnonzero(first[codes] != folds)
    if len(apart):
        raise ValueError(
            f"groups: {str(groups[apart[0]])!r} has lesions in folds {first[codes[apart[0]]]} and {folds[apart[0]]}; "
            "expected a patient's lesions in one fold"
        )


def _choose_rounds(
    boosters: list[list[lightgbm.Booster]],
    held_out: list[np.ndarray],
    matrix: np.ndarray,
    margins: np.ndarray,
    labels: np.ndarray,
    task: TaskSpec,
    most_rounds: int,
) -> tuple[int, np.ndarray]:
    """Grows the booster of each bag and fold in step and watches the log loss of the rows held out.

    Returns:
        (rounds with the lowest loss, 0 included; out-of-fold logits (N, K) at that number).
    """

    def log_loss(logits: np.ndarray) -> float:
        return -float(np.mean(log_softmax(logits)[np.arange(len(labels)), labels]))

    parts = [matrix[rows] for rows in held_out]
    logits = margins.copy()
    best_loss, best_rounds, best_logits = log_loss(margins), 0, margins
    for start in range(0, most_rounds, _ROUND_STEP):
        rounds = min(_ROUND_STEP, most_rounds - start)
        for bag in boosters:
            for rows, part, booster in zip(held_out, parts, bag, strict=True):
                before = booster.current_iteration()
                if added := grow(booster, rounds):
                    logits[rows] += raw_scores(booster, part, task.malignant_mask, before, added) / len(boosters)
        loss = log_loss(logits)
        if loss < best_loss:
            best_loss, best_rounds, best_logits = loss, start + rounds, logits.copy()
        elif start + rounds - best_rounds >= _PATIENCE:
            break
    return best_rounds, best_logits
