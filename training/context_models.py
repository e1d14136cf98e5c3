"""One fusion model per context: fitted out of fold, saved into the bundle, evaluated on the gate split, and compared
with the others and with a model of metadata alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipelines.image_dataset import DatasetVersion, training_shares
from data_pipelines.table_scoring import metadata_arrays
from modeling.metadata_fusion import ContextModel, fit_context_model
from modeling.metrics import evaluate, risk
from modeling.schema import Context
from training.clinical_report import clinical_report, missed_cancers, paired_gains
from training.config import BuildConfig, TrainingConfig
from training.evaluation_notes import evaluation_notes
from training.institution_report import institution_names, leave_one_institution_out
from training.ood_report import OodReport

TABULAR_ONLY = "tabular_only"
# Threshold and risk calibration were fitted on the out-of-fold predictions: on these very rows they are right by
# construction (slope 1, the sensitivity asked for), which says nothing. The gate split tells.
_FITTED_ON_TRAINING_ROWS = ("sensitivity", "specificity", "ece", "calibration_slope", "calibration_intercept")
# Risks for another prevalence than the gate split's are right on average elsewhere, not there.
_OF_THE_PREVALENCE = ("ece", "calibration_intercept")


@dataclass
class ContextResults:
    """What was measured.

    Attributes:
        evaluation: context -> {"gate", "out_of_fold", "per_fold", "clinical", "notes"}, JSON-ready; what cannot be
            measured is None, and a note says why. Out of fold and per fold, what the operating threshold and the risk
            calibration decide is None too: both were fitted on these rows. The number of boosting rounds and the kinds
            of trees were chosen on them as well, so their AUC and pAUC are a little better than on new lesions.
        comparison: {"tabular_only": as in `evaluation`, or None where there is nothing to compare; "gains": split ->
            rows of `paired_gains`; "institutions": rows of `leave_one_institution_out` of the last context, or None}.
        gate_probabilities: context -> float64 (N, K) of the gate split's rows.
        thresholds: context -> risk from which a lesion counts as found.
        out_of_fold: context -> float64 (N, K) of the training rows, each by a model that saw no row of its fold (but
            for the risk calibration, two numbers fitted on all of them).
        ood: what the abstention rule refuses; None without one.
        missed: context -> malignant gate lesions below the operating threshold (holds ids: not for the bundle).
    """

    evaluation: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    gate_probabilities: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    out_of_fold: dict[str, np.ndarray] = field(default_factory=dict)
    missed: dict[str, pd.DataFrame] = field(default_factory=dict)
    ood: OodReport | None = None


def priors(
    version: DatasetVersion, training: TrainingConfig, prevalence: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Class shares float64 (K,) that the network trained at, and those that risks are for.

    The former are those of the data without a network. The latter are those of the data, but with `prevalence`
    malignant lesions if that is given: the classes of either kind keep their shares of it.
    """
    sampling, shares = training_shares(version, version.training_folds, training.sampling)
    sampling = shares if version.images_path is None else sampling
    if prevalence is None:
        return sampling, shares
    malignant = version.task.malignant_mask
    of_kind = np.where(malignant, shares[malignant].sum(), shares[~malignant].sum())
    return sampling, shares / of_kind * np.where(malignant, prevalence, 1.0 - prevalence)


def fit_contexts(
    directory: Path,
    version: DatasetVersion,
    training: TrainingConfig,
    config: BuildConfig,
    out_of_fold: np.ndarray | None,
    gate_images: np.ndarray | None,
    say: Callable[[str], None],
) -> ContextResults:
    """Fits, saves and evaluates every context's model.

    Args:
        directory: the bundle's.
        out_of_fold, gate_images: log-probabilities float64 (N, K) of the training and gate rows in table order; None
            without a network.
    """
    fitting = _Fitting(version, training, config)
    results = ContextResults()
    risks: dict[str, dict[str, np.ndarray]] = {"gate": {}, "out_of_fold": {}}
    task = version.task
    for context in task.contexts if gate_images is not None else task.tabular_contexts:
        say(f"context {context}: fusion, calibration, thresholds, evaluation")
        model, fused = fitting.fit(context, out_of_fold)
        probabilities = fitting.predict(model, fitting.held_out, gate_images)
        report = fitting.evaluate(model, probabilities, fused) | {
            "notes": evaluation_notes(version, context, config.prevalence)
        }
        results.evaluation[context], results.gate_probabilities[context] = report, probabilities
        results.thresholds[context], results.out_of_fold[context] = model.thresholds.threshold, fused
        results.missed[context] = missed_cancers(task, fitting.held_out, probabilities, results.thresholds[context])
        risks["gate"][context], risks["out_of_fold"][context] = risk(probabilities, task), risk(fused, task)
        model.save(directory / "contexts" / context)
        path = directory / "contexts" / context / "metrics.json"
        path.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")

    results.comparison[TABULAR_ONLY] = None
    if gate_images is not None and task.columns:
        say("metadata alone, to compare with")
        model, fused = fitting.fit(task.tabular_contexts[-1], None)
        probabilities = fitting.predict(model, fitting.held_out, None)
        results.comparison[TABULAR_ONLY] = fitting.evaluate(model, probabilities, fused)
        # First, so that every other model's gain over it is measured.
        risks["gate"] = {TABULAR_ONLY: risk(probabilities, task)} | risks["gate"]
        risks["out_of_fold"] = {TABULAR_ONLY: risk(fused, task)} | risks["out_of_fold"]
    results.comparison["institutions"] = fitting.institutions(context, out_of_fold, risks["out_of_fold"][context], say)
    for note in dict.fromkeys(note for report in results.evaluation.values() for note in report["notes"]):
        say(f"note: {note}")
    say("paired differences between the models")
    results.comparison["gains"] = {split: fitting.gains(split, scores) for split, scores in risks.items()}
    return results


class _Fitting:
    """What all contexts' models share: rows, labels, groups, settings."""

    def __init__(self, version: DatasetVersion, training: TrainingConfig, config: BuildConfig):
        self.task, self.config, self.seed = version.task, config, training.seed
        self.train = version.lesions.iloc[version.training_positions]
        self.held_out = version.lesions.iloc[version.gate_positions]
        self.num_folds = version.num_folds
        self.labels, self.folds = (self.train[name].to_numpy(np.int64) for name in ("label", "fold"))
        self.priors = priors(version, training, config.prevalence)

    def fit(
        self, context: Context, images: np.ndarray | None, rows: np.ndarray | slice = slice(None)
    ) -> tuple[ContextModel, np.ndarray]:
        """A model of some training rows (bool (N,)) and its out-of-fold probabilities of these."""
        table = self.train[rows]
        groups = table["context" if context == "patient" else "group"].to_numpy(str)
        sampling, population = self.priors
        # Of some rows, their own shares: those of all would tell a model the labels of the rows left out.
        own = population if isinstance(rows, slice) else None
        return fit_context_model(
            context,
            self.task,
            None if images is None else images[rows],
            metadata_arrays(table, self.task),
            self.labels[rows],
            groups,
            self.folds[rows],
            self.config.fusion,
            sampling,
            own,
            self.seed,
        )

    def predict(self, model: ContextModel, table: pd.DataFrame, images: np.ndarray | None) -> np.ndarray:
        """Probabilities float64 (N, K) of a table's lesions."""
        if model.context == "image_only":
            return model.predict(images, None, None)
        groups = table["context"].to_numpy(str) if model.context == "patient" else None
        return model.predict(images, metadata_arrays(table, self.task), groups)

    def institutions(
        self, context: Context, images: np.ndarray | None, seen: np.ndarray, say: Callable[[str], None]
    ) -> list[dict[str, Any]] | None:
        """What a context's fusion loses at an institution it has not seen. The networks saw lesions of all of them.

        None where there are no institutions, or each is a fold: then all out-of-fold scores are of unseen ones.
        """
        if self.task.institution_column is None or not self.config.leave_institution_out:
            return None
        institutions = institution_names(self.train[self.task.institution_column])
        if all(len(np.unique(self.folds[institutions == name])) == 1 for name in np.unique(institutions)):
            return None

        def fit_predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
            model, _ = self.fit(context, images, train)
            return risk(self.predict(model, self.train[test], None if images is None else images[test]), self.task)

        return leave_one_institution_out(
            institutions,
            self.task.malignant_mask[self.labels],
            seen,
            self.train["group"].to_numpy(str),
            self.folds,
            fit_predict,
            self.config.num_bootstrap,
            self.seed,
            say,
        )

    def evaluate(self, model: ContextModel, probabilities: np.ndarray, fused: np.ndarray) -> dict[str, Any]:
        def measure(table: pd.DataFrame, values: np.ndarray) -> dict[str, Any]:
            labels, groups = table["label"].to_numpy(np.int64), table["group"].to_numpy(str)
            limit, samples = model.thresholds.threshold, self.config.num_bootstrap
            return evaluate(self.task, labels, values, groups, limit, samples, self.seed)

        folds = [self.folds == fold for fold in range(self.num_folds)]
        assert model.sets is not None
        unseen = {name: None for name in _FITTED_ON_TRAINING_ROWS}
        none_bounds = {"low": None, "high": None}

        def measure_training(rows: np.ndarray | slice) -> dict[str, Any]:
            report = measure(self.train[rows], fused[rows]) | unseen
            report["intervals"] |= {name: none_bounds for name in report["intervals"] if name in unseen}
            return report

        gate = measure(self.held_out, probabilities)
        if self.config.prevalence is not None:
            gate |= dict.fromkeys(_OF_THE_PREVALENCE)
        return {
            "gate": gate,
            "out_of_fold": measure_training(slice(None)),
            "per_fold": [measure_training(rows) for rows in folds],
            "clinical": clinical_report(
                self.task,
                self.held_out,
                probabilities,
                model.thresholds,
                model.sets,
                self.config.num_bootstrap,
                self.seed,
                self.config.prevalence,
            ),
        }

    def gains(self, split: str, risks: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        table = self.held_out if split == "gate" else self.train
        malignant = self.task.malignant_mask[table["label"].to_numpy(np.int64)]
        return paired_gains(malignant, risks, table["group"].to_numpy(str), self.config.num_bootstrap, self.seed)
