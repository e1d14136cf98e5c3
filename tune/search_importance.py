"""Which hyperparameters the score of a search's trials depended on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.figures import headless_pyplot
from tune.search_ledger import SearchLedger, TrialEntry, short_names
from tune.search_space import Choice, SearchSpace, Uniform

# Below this many trials fANOVA's forest describes the draw rather than the hyperparameters.
ENOUGH_TRIALS = 8
NUM_RESAMPLES = 20


def importances(ledger: SearchLedger, space: SearchSpace, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Space field -> share of the score's variance it explains by fANOVA (Hutter, Hoos, Leyton-Brown, ICML 2014), and
    the 10th and 90th percentile of that share over resamples of the trials. Empty with fewer than two trials.

    Scores are `SearchLedger.adjusted_scores`, so that pruned trials count.
    """
    adjusted = ledger.adjusted_scores()
    entries = [entry for entry in ledger.entries() if entry.number in adjusted]
    if len(entries) < 2:
        return {}
    generator = np.random.default_rng(seed)
    whole = _fanova(entries, adjusted, space, seed)
    resampled: list[dict[str, float]] = []
    for number in range(NUM_RESAMPLES):
        drawn = generator.integers(len(entries), size=len(entries))
        if len(set(drawn)) > 1:
            resampled.append(_fanova([entries[i] for i in drawn], adjusted, space, seed + number + 1))
    shares = {}
    for field in space:
        spread = [sample[field] for sample in resampled] or [whole[field]]
        shares[field] = (whole[field], *(float(q) for q in np.quantile(spread, [0.1, 0.9])))
    return dict(sorted(shares.items(), key=lambda item: -item[1][0]))


def _fanova(entries: list[TrialEntry], adjusted: dict[int, float], space: SearchSpace, seed: int) -> dict[str, float]:
    import optuna
    from optuna import distributions as optuna_distributions
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    kinds: dict[str, Any] = {}
    for field, distribution in space.items():
        if isinstance(distribution, Choice):
            kinds[field] = optuna_distributions.CategoricalDistribution(distribution.labels)
        elif isinstance(distribution, Uniform):
            kinds[field] = optuna_distributions.FloatDistribution(*distribution.ends, log=distribution.log)
        else:
            ends, step = distribution.ends, distribution.step
            kinds[field] = optuna_distributions.IntDistribution(*ends, log=distribution.log, step=step)
    scores = [adjusted[entry.number] for entry in entries]
    if max(scores) - min(scores) < 1e-12:
        return dict.fromkeys(space, 0.0)
    logged = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        for entry, score in zip(entries, scores, strict=True):
            study.add_trial(optuna.trial.create_trial(params=entry.params, distributions=kinds, value=score))
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=32, seed=seed))
    finally:
        optuna.logging.set_verbosity(logged)
    return {field: float(shares.get(field, 0.0)) for field in space}


def plot_importance(path: Path, ledger: SearchLedger, space: SearchSpace) -> None:
    """Draws `importances` as bars; with fewer than ENOUGH_TRIALS scored trials marked as saying nothing."""
    pyplot = headless_pyplot()
    shares = importances(ledger, space)
    count = len(ledger.adjusted_scores())
    figure, axes = pyplot.subplots(figsize=(8.5, 1.9 + 0.42 * max(len(space), 2)), layout="constrained")
    names = short_names(list(space))
    fields = list(shares or space)[::-1]
    values = np.array([shares.get(field, (0.0, 0.0, 0.0)) for field in fields])
    few = count < ENOUGH_TRIALS
    axes.barh(range(len(fields)), values[:, 0], color="#c8c8c8" if few else "#3b6ea5", height=0.6)
    axes.hlines(range(len(fields)), values[:, 1], values[:, 2], color="black", lw=1.2)
    axes.set_yticks(range(len(fields)), [names[field].replace("_", " ") for field in fields])
    axes.set(
        xlim=(0, 1),
        xlabel="share of the variance of the mean pAUC between trials (line: 10-90 % of resampled trials)",
        title=f"Importance by fANOVA, {count} trials",
    )
    if few:
        axes.text(
            0.98,
            0.5,
            f"not meaningful:\n{count} trials, {ENOUGH_TRIALS} are the least",
            transform=axes.transAxes,
            ha="right",
            va="center",
            color="#b03030",
            fontsize=13,
        )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
