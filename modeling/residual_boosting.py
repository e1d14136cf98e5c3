"""LightGBM boosters that correct given logits: their boosting starts from another model's prediction.

Trained with missing values that carry no information. In ISIC 2024 a missing body site means benign, and a model that
learned so would call a lesion safer because a caller left a field out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import lightgbm

# Below that, threads cost more than they bring.
MANY_ROWS = 20_000


def leave_out_at_random(encoded: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Makes missingness uninformative: fills what is missing, then leaves values out at random.

    Args:
        encoded: float (N, C), NaN = missing.
        share: of the rows to leave values out of; each of them loses a random share of its columns, from none to all.
        rng: source of the draws.

    Returns:
        A copy, float64 (N, C). Gaps are filled with values drawn from the same column (columns without any value stay
        missing) before values are left out.
    """
    result = np.array(encoded, dtype=np.float64)
    for column in result.T:
        missing = np.isnan(column)
        if missing.any() and not missing.all():
            column[missing] = rng.choice(column[~missing], size=missing.sum())
    rate = np.where(rng.random(len(result)) < share, rng.random(len(result)), 0.0)
    result[rng.random(result.shape) < rate[:, None]] = np.nan
    return result


def start_booster(
    matrix: np.ndarray,
    margins: np.ndarray,
    labels: np.ndarray,
    malignant_mask: np.ndarray,
    categorical_features: list[int],
    parameters: dict[str, Any],
) -> lightgbm.Booster:
    """A booster of no trees yet, which `grow` boosts from given logits; deterministic for the same inputs.

    Args:
        matrix: features float32 (N, F), NaN = missing.
        margins: log-probabilities (N, K) to start from.
        labels: class indices int (N,).
        malignant_mask: bool (K,); two classes train a binary booster for the malignant one.
        categorical_features: columns of the matrix that hold category codes.
        parameters: LightGBM parameters, seed included.
    """
    import lightgbm

    num_classes = margins.shape[1]
    if num_classes == 2:
        objective: dict[str, Any] = {"objective": "binary"}
        start = margins[:, malignant_mask][:, 0] - margins[:, ~malignant_mask][:, 0]
        labels = malignant_mask[labels].astype(np.int64)
    else:
        objective = {"objective": "multiclass", "num_class": num_classes}
        start = margins
    fixed = {"deterministic": True, "force_row_wise": True, "boost_from_average": False, "verbosity": -1}
    parameters = objective | fixed | parameters
    data = lightgbm.Dataset(
        matrix, labels, init_score=start, categorical_feature=categorical_features, params=parameters
    )
    return lightgbm.Booster(parameters, data)


def grow(booster: lightgbm.Booster, num_rounds: int) -> int:
    """Adds boosting rounds and returns how many were added: fewer where no split is left."""
    before = booster.current_iteration()
    for _ in range(num_rounds):
        if booster.update():
            break
    return booster.current_iteration() - before


def finish(booster: lightgbm.Booster) -> lightgbm.Booster:
    """The booster without its training rows, exactly as it will be read from a bundle."""
    import lightgbm

    return lightgbm.Booster(model_str=booster.model_to_string())


def raw_scores(
    booster: lightgbm.Booster, matrix: np.ndarray, malignant_mask: np.ndarray, start: int = 0, num_rounds: int = -1
) -> np.ndarray:
    """Logits float64 (N, K) that `num_rounds` rounds from `start` (-1: all) add; of two classes only malignant moves.

    One thread, unless there are very many rows: for a single lesion the thread pool costs more than the trees.
    """
    threads = 1 if len(matrix) < MANY_ROWS else 0
    raw = booster.predict(matrix, raw_score=True, start_iteration=start, num_iteration=num_rounds, num_threads=threads)
    return raw if raw.ndim == 2 else raw[:, None] * malignant_mask


def load_booster(path: Path) -> lightgbm.Booster:
    """Reads a booster from LightGBM's text format.

    Raises:
        ValueError: missing or unreadable file.
    """
    import lightgbm

    if not path.is_file():
        raise ValueError(f"fusion model file {path} is missing")
    try:
        return lightgbm.Booster(model_file=path)
    except lightgbm.basic.LightGBMError as error:
        raise ValueError(f"fusion model file {path} cannot be read: {error}") from error
