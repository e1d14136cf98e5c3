"""What fusion must show on synthetic lesions: a gain over picture and metadata alone, and nothing of shuffled labels.

A logistic regression on what the picture of a lesion shows stands for the network, so that no picture is painted and no
Ray cluster started; everything after the network is the pipeline's own.
"""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.stratified_folds import assign_folds
from data_pipelines.synthetic_metadata import build_metadata
from data_pipelines.synthetic_patients import draw_latents
from modeling.calibration import log_softmax
from modeling.metadata_fusion import BoosterConfig, FusionConfig
from modeling.schema import TaskSpec
from ray_jobs.job import REPO_ROOT, read_yaml
from training.config import BuildConfig, TrainingConfig
from training.context_models import TABULAR_ONLY, fit_contexts

TASK = TaskSpec(**read_yaml(REPO_ROOT / "configs/demo/prepare_dataset.yaml")["task"])
NUM_FOLDS, GATE_FRACTION, NUM_SHUFFLES = 3, 0.15, 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Lesions:
    """Synthetic patients: their metadata, and what a picture of each lesion shows, float64 (N, 4)."""

    def __init__(self, num_patients, per_patient, prevalence, seed):
        rng = np.random.default_rng(seed)
        latents = draw_latents(num_patients, per_patient, prevalence, rng)
        self.table = build_metadata(latents, rng, "0000")
        self.target = latents.target
        # As data_pipelines.synthetic_dataset paints them; of the veil only what is above its threshold.
        apparent = 0.5 * latents.offset
        shown = [latents.size + 1.07 * latents.offset, latents.border + apparent, latents.colour + apparent]
        self.shown = np.stack([*shown, np.clip(0.5 * latents.veil - 0.1, 0, 1)], axis=1)
        self.shown += rng.normal(0, [0.3, 0.3, 0.3, 0.15], self.shown.shape)

    def version(self, folder, labels):
        """A data set of these lesions with these labels int64 (N,), divided as prepare_dataset does."""
        groups = self.table["patient_id"].to_numpy(str)
        folds = assign_folds(labels, groups, TASK.classes, NUM_FOLDS, GATE_FRACTION, seed=0)
        own = {"id": self.table["isic_id"], "group": groups, "context": groups, "label": labels, "fold": folds}
        columns = dict.fromkeys([*TASK.columns, *TASK.subgroup_columns, TASK.institution_column])
        lesions = pd.DataFrame(own | {name: self.table[name] for name in columns})
        return DatasetVersion(folder, TASK, "d" * 64, "images.hdf5", lesions, NUM_FOLDS)

    def image_scores(self, labels, folds):
        """Log-probabilities (N, 2): of a fold by a "network" that did not see it, of the gate split by the refit."""
        scores = np.empty((len(labels), 2))
        for fold in np.unique(folds):
            seen = (folds != fold) & (folds >= 0)
            network = LogisticRegression(class_weight="balanced").fit(self.shown[seen], labels[seen])
            logit = network.decision_function(self.shown[folds == fold])
            scores[folds == fold] = log_softmax(np.stack([np.zeros_like(logit), logit], axis=1))
        return scores


def fitted(folder, lesions, labels, fusion, num_bootstrap):
    version = lesions.version(folder, labels)
    scores = lesions.image_scores(labels, version.lesions["fold"].to_numpy())
    parts = [scores[positions] for positions in (version.training_positions, version.gate_positions)]
    config = BuildConfig(fusion=fusion, num_bootstrap=num_bootstrap)
    return fit_contexts(folder, version, TrainingConfig(), config, *parts, lambda line: None)


def test_fused_beats_image_only_and_tabular_only(tmp_path):
    """As many lesions as the demo's. Out of fold, where almost six times as many lesions are as in the gate split: an
    interval over the gate split's 70 cancers would be as wide as the gain."""
    lesions = Lesions(400, 11.0, 0.12, seed=7)
    results = fitted(
        tmp_path, lesions, lesions.target, FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=100), 300
    )
    gains = {(row["model"], row["against"]): row for row in results.comparison["gains"]["out_of_fold"]}
    for against in ("image_only", TABULAR_ONLY):
        for metric in ("auc", "pauc"):
            assert gains["patient", against][metric]["low"] > 0, (against, metric)
    assert gains["none", "image_only"]["auc"]["low"] > 0
    # On lesions that trained nothing the same direction.
    held_out = {(row["model"], row["against"]): row for row in results.comparison["gains"]["gate"]}
    assert all(held_out["patient", against]["auc"]["value"] > 0 for against in ("image_only", TABULAR_ONLY))


def test_shuffled_labels_give_chance(tmp_path):
    """Folds, scaling, boosters, choice of rounds, calibration: if any saw a label it predicts, this were not 0.5."""
    lesions = Lesions(160, 6.0, 0.2, seed=1)
    measured = {"out_of_fold": [], "gate": []}
    for shuffle in range(NUM_SHUFFLES):
        labels = np.random.default_rng(shuffle).permutation(lesions.target)
        folder = tmp_path / str(shuffle)
        results = fitted(
            folder, lesions, labels, FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=30), 50
        )
        for split, rows in measured.items():
            parts = [results.evaluation[context][split] for context in ("none", "patient")]
            parts.append(results.comparison[TABULAR_ONLY][split])
            rows.append([[part[metric]["value"] for metric in ("auc", "pauc")] for part in parts])
    auc, pauc = np.mean(measured["out_of_fold"], axis=0).T
    assert np.abs(auc - 0.5).max() < 0.03 and np.abs(pauc - 0.02).max() < 0.01, (auc, pauc)
    auc, pauc = np.mean(measured["gate"], axis=0).T  # a sixth of the rows
    assert np.abs(auc - 0.5).max() < 0.05 and np.abs(pauc - 0.02).max() < 0.015, (auc, pauc)
