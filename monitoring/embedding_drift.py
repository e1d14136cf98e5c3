"""Embedding drift: can a classifier tell the day's embeddings from the reference's?

A linear classifier sees a shift that is spread thinly over all 64 dimensions and that no single one shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

NUM_FOLDS = 3
# With one partition the AUC of one and the same 40 patients against 60 had a spread of 0.02, with five of 0.006.
NUM_PARTITIONS = 5
# Both sides are thinned to this many rows, by whole patients; more only cost time.
MAX_ROWS = 2_000
_REGULARISATION = 0.1


@dataclass(frozen=True)
class EmbeddingDrift:
    """AUC of the domain classifier on patients it was not fitted on: 0.5 = the same; drifted = auc >= threshold."""

    auc: float
    threshold: float
    drifted: bool
    n_reference: int
    n_current: int


def embedding_drift(
    reference: np.ndarray,
    current: np.ndarray,
    reference_groups: np.ndarray,
    current_groups: np.ndarray,
    false_alarm_rate: float,
    num_splits: int = 40,
    seed: int = 0,
    max_rows: int | None = None,
) -> EmbeddingDrift | None:
    """Compares float embeddings (N, D) and (M, D) of patients (N,) and (M,); None with under two patients per fold.

    The threshold comes from the reference alone: `num_splits` times its patients are cut into two random halves, and
    the AUC between the halves shows how far chance goes. It is scaled from the halves' numbers of patients to the real
    ones (the spread falls with the square root), and read off a normal distribution at `false_alarm_rate`. A side with
    more than `max_rows` rows (None: `MAX_ROWS`) is thinned to them.
    """
    # Imported first: a limit reaches only the thread pools that are loaded.
    import sklearn.linear_model
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(seed)
    reference, reference_codes = _thin(reference, reference_groups, rng, max_rows or MAX_ROWS)
    current, current_codes = _thin(current, current_groups, rng, max_rows or MAX_ROWS)
    num_reference, num_current = len(np.unique(reference_codes)), len(np.unique(current_codes))
    if num_reference < 4 * NUM_FOLDS or num_current < 2 * NUM_FOLDS:
        return None
    half = num_reference // 2
    # On busy cores a fit of 400 x 64 takes 7 ms with one BLAS thread and 74 ms with two that wait for each other.
    # Checking its own parameters and our finite figures takes sklearn longer than a fit of this size.
    quick = sklearn.config_context(assume_finite=True, skip_parameter_validation=True)
    with threadpool_limits(1), quick:
        null = []
        for _ in range(num_splits):
            first = np.isin(reference_codes, rng.permutation(num_reference)[:half])
            sides = (reference[first], reference[~first], reference_codes[first], reference_codes[~first])
            null.append(domain_auc(*sides, rng))
        auc = round(domain_auc(reference, current, reference_codes, current_codes, rng), 6)
    # The root mean square around 0.5 takes in a bias of the cross-validation as well as the spread.
    spread = np.sqrt(np.mean((np.array(null) - 0.5) ** 2))
    of_halves = 1.0 / half + 1.0 / (num_reference - half)
    spread *= np.sqrt((1.0 / num_reference + 1.0 / num_current) / of_halves)
    threshold = round(float(0.5 + student.isf(false_alarm_rate, num_splits) * spread), 6)
    return EmbeddingDrift(auc, threshold, auc >= threshold, len(reference), len(current))


def domain_auc(
    reference: np.ndarray,
    current: np.ndarray,
    reference_groups: np.ndarray,
    current_groups: np.ndarray,
    rng: np.random.Generator,
) -> float:
    """Mean held-out AUC of logistic regression on standardised embeddings, over five partitions of whole patients into
    three folds."""
    from sklearn.linear_model import LogisticRegression

    scale = reference.std(axis=0)
    rows = (np.vstack([reference, current]) - reference.mean(axis=0)) / np.where(scale > 0, scale, 1.0)
    is_current = np.repeat([0, 1], [len(reference), len(current)])
    model = LogisticRegression(C=_REGULARISATION, solver="newton-cholesky", class_weight="balanced")
    scores = []
    for _ in range(NUM_PARTITIONS):
        folds = np.concatenate([_folds(reference_groups, rng), _folds(current_groups, rng)])
        for fold in range(NUM_FOLDS):
            held_out = folds == fold
            model.fit(rows[~held_out], is_current[~held_out])
            scores.append(_auc(is_current[held_out], rows[held_out] @ model.coef_[0]))
    return float(np.mean(scores))


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve from ranks (Mann-Whitney), ties counted half."""
    num = int(labels.sum())
    ranks = rankdata(scores)[labels == 1].sum()
    return float((ranks - num * (num + 1) / 2) / (num * (len(labels) - num)))


def _folds(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    unique, codes = np.unique(groups, return_inverse=True)
    return (rng.permutation(len(unique)) % NUM_FOLDS)[codes]


def _thin(
    rows: np.ndarray, groups: np.ndarray, rng: np.random.Generator, max_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    codes = np.unique(groups, return_inverse=True)[1]
    if len(rows) > max_rows:
        counts = np.bincount(codes)
        order = rng.permutation(len(counts))
        keep = np.isin(codes, order[: max(4 * NUM_FOLDS, int((np.cumsum(counts[order]) <= max_rows).sum()))])
        rows, codes = rows[keep], np.unique(codes[keep], return_inverse=True)[1]
    return rows.astype(np.float64), codes
