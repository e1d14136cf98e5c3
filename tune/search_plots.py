"""The pictures and the table of a search: trials over their hyperparameters, what mattered, what the best one cost."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from tune.search_ledger import SearchLedger, TrialEntry, short_names
from tune.search_space import Choice, Distribution, Integer, SearchSpace, Uniform

# Below this many trials fANOVA's forest describes the draw rather than the hyperparameters.
ENOUGH_TRIALS = 8
# An axis of at most so many whole numbers shows each.
MAX_GRID = 8
NUM_RESAMPLES = 20


def write_search_report(folder: Path, ledger: SearchLedger, space: SearchSpace) -> None:
    """`trials.csv`, `parallel_coordinates.png`, `importance.png` and `best_over_cost.png`."""
    trials_table(ledger).to_csv(folder / "trials.csv", index=False)
    plot_parallel_coordinates(folder / "parallel_coordinates.png", ledger, space)
    plot_importance(folder / "importance.png", ledger, space)
    plot_best_over_cost(folder / "best_over_cost.png", ledger)


def trials_table(ledger: SearchLedger) -> Any:
    """A pandas row per trial: number, state, folds, scores, seconds, params, and the pAUC of each fold."""
    import pandas as pd

    adjusted = ledger.adjusted_scores()
    rows = []
    for entry in ledger.entries():
        row: dict[str, Any] = {"trial": entry.number, "state": entry.state, "folds": len(entry.folds)}
        row["mean_pauc"] = entry.score if entry.folds else None
        row["mean_pauc_adjusted"] = adjusted.get(entry.number)
        row["mean_auc"] = entry.mean_auc if entry.folds else None
        row["seconds"] = sum(fold.seconds for fold in entry.folds)
        row |= entry.params
        row |= {f"fold_{number + 1}_pauc": fold.pauc for number, fold in enumerate(entry.folds)}
        rows.append({**row, "error": entry.error})
    return pd.DataFrame(rows)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _counts(ledger: SearchLedger) -> str:
    counts = [f"{ledger.count(state)} {state}" for state in ("finished", "pruned", "failed") if ledger.count(state)]
    return f"{len(ledger.trials)} trials: {', '.join(counts)}"


def _number(value: float) -> str:
    """Three significant digits, trailing zeros dropped."""
    return f"{value:.3g}".replace("e-0", "e-")


class _Axis:
    """One vertical axis: where a value lies in [0, 1], and its ticks."""

    def __init__(self, distribution: Distribution):
        self._labels = distribution.labels if isinstance(distribution, Choice) else None
        self.log = not isinstance(distribution, Choice) and distribution.log
        self._grid: list[int] = []
        if isinstance(distribution, Integer):
            self._grid = list(range(distribution.low, distribution.high + 1, distribution.step))
        if self._labels is None:
            self._low, self._high = (self._scale(end) for end in distribution.ends)

    @property
    def num_values(self) -> int:
        """How many values there are where they are few, else 0."""
        count = len(self._labels) if self._labels is not None else len(self._grid)
        return count if count <= MAX_GRID else 0

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else float(value)

    def place(self, value: Any) -> float:
        if self._labels is not None:
            return 0.5 if len(self._labels) == 1 else self._labels.index(value) / (len(self._labels) - 1)
        return (self._scale(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        if self._labels is not None:
            # Of "backbone=a, weights=b" the names of the fields would be the longest part.
            shown = [re.sub(r"(^|, )[\w.]+=", r"\1", str(value)).replace("_", " ") for value in self._labels]
            return [
                (self.place(value), textwrap.fill(text, 18)) for value, text in zip(self._labels, shown, strict=True)
            ]
        if self.num_values:
            return [(self.place(value), str(value)) for value in self._grid]
        if self.log:
            decades = range(math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9) + 1)
            inner = [10.0**decade for decade in decades if 0.1 < (decade - self._low) / (self._high - self._low) < 0.9]
            values = [10**self._low, *inner, 10**self._high]
        else:
            values = list(np.linspace(self._low, self._high, 5))
        return [(self.place(value), _number(value)) for value in values]


def plot_parallel_coordinates(path: Path, ledger: SearchLedger, space: SearchSpace) -> None:
    """Draws each trial with a score as a line over its hyperparameters; the last axis and the colour are its score.

    Pruned trials are thin and dashed; their score is what `SearchLedger.adjusted_scores` makes of their folds.
    """
    pyplot = _pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    adjusted, best = ledger.adjusted_scores(), ledger.best()
    drawn = sorted((e for e in ledger.entries() if e.number in adjusted), key=lambda entry: adjusted[entry.number])
    axes_of = {field: _Axis(distribution) for field, distribution in space.items()}
    names = short_names(list(space))
    last = len(space)
    figure, axes = pyplot.subplots(figsize=(3.2 + 1.75 * (last + 1), 6.2), layout="constrained")
    low, high = (min(adjusted.values()), max(adjusted.values())) if adjusted else (0.0, 0.2)
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    margin = 0.04 * (high - low)
    score_axis = _Axis(Uniform(kind="uniform", low=low - margin, high=high + margin))
    colours, scale = pyplot.get_cmap("viridis"), pyplot.Normalize(low, high)

    spread = _spread(drawn, axes_of)
    for entry in drawn:
        heights = [*spread[entry.number], score_axis.place(adjusted[entry.number])]
        points = [(0.0, heights[0])]
        for x in range(last):
            points += [(x + 0.4, heights[x]), (x + 0.6, heights[x + 1]), (x + 1.0, heights[x + 1])]
        curve = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * (3 * last)])
        pruned, chosen = entry.state != "finished", best is not None and entry.number == best.number
        if chosen:
            axes.add_patch(PathPatch(curve, fill=False, ec="black", lw=5.0, zorder=3))
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                ec=colours(scale(adjusted[entry.number])),
                lw=1.1 if pruned else 2.4,
                ls=(0, (4, 2)) if pruned else "-",
                alpha=0.8 if pruned else 1.0,
                zorder=3 if chosen else 2,
            )
        )
    for x, (title, axis) in enumerate([*((names[f], a) for f, a in axes_of.items()), ("mean pAUC", score_axis)]):
        axes.plot([x, x], [-0.1, 1.1], color="black", lw=1.0, zorder=4)
        for y, text in axis.ticks():
            axes.plot([x - 0.02, x + 0.02], [y, y], color="black", lw=1.0, zorder=4)
            box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
            axes.text(x - 0.04, y, text, ha="right", va="center", fontsize=9, bbox=box, zorder=5)
        lines = textwrap.wrap(title.replace("_", " "), 16) + ["log"] * axis.log
        axes.text(x, 1.12, "\n".join(lines), ha="center", va="bottom", fontsize=11)
    axes.set(xlim=(-0.75, last + 0.12), ylim=(-0.11, 1.26))
    axes.axis("off")
    handles = [
        Line2D([], [], color="grey", lw=2.4, label="all folds"),
        Line2D([], [], color="grey", lw=1.1, ls=(0, (4, 2)), label="pruned; scored as if it had all folds"),
        Line2D([], [], color="black", lw=5.0, label="best"),
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    figure.colorbar(pyplot.cm.ScalarMappable(scale, colours), ax=axes, label="mean pAUC", shrink=0.7, pad=0.01)
    figure.suptitle(_counts(ledger))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _spread(drawn: list[TrialEntry], axes_of: dict[str, _Axis]) -> dict[int, list[float]]:
    """Trial number -> its height on each axis; trials of one value of few are set side by side, best on top."""
    heights: dict[int, list[float]] = {entry.number: [] for entry in drawn}
    for field, axis in axes_of.items():
        groups: dict[float, list[int]] = {}
        for entry in drawn:
            groups.setdefault(axis.place(entry.params[field]), []).append(entry.number)
        width = min(0.08, 0.3 / max(1, axis.num_values - 1)) if axis.num_values else 0.0
        for height, numbers in groups.items():
            offsets = np.linspace(-width, width, len(numbers)) if len(numbers) > 1 else [0.0]
            for number, offset in zip(numbers, offsets, strict=True):
                heights[number].append(height + offset)
    return heights


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
    pyplot = _pyplot()
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


def plot_best_over_cost(path: Path, ledger: SearchLedger) -> None:
    """Draws each trial's mean over its folds as they came, and the best finished mean, against the workers' hours."""
    pyplot = _pyplot()
    unit, of = ("GPU", "gpu_hours") if ledger.gpu_seconds else ("CPU", "cpu_hours")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    finished: list[tuple[float, float]] = []
    labelled: set[str] = set()
    for entry in ledger.entries():
        means = [
            entry.model_copy(update={"folds": entry.folds[: count + 1]}).score for count in range(len(entry.folds))
        ]
        if not means:
            continue
        hours = [getattr(fold, of) for fold in entry.folds]
        colour = "#3b6ea5" if entry.state == "finished" else "#b0b0b0"
        axes.plot(hours, means, "-", color=colour, lw=1.0, alpha=0.7)
        axes.plot(hours[:-1], means[:-1], ".", color=colour, ms=5)
        name = {"finished": "mean over all folds", "pruned": "pruned"}.get(entry.state, entry.state)
        marker = "o" if entry.state == "finished" else "x"
        axes.plot(hours[-1], means[-1], marker, color=colour, ms=7, label=None if name in labelled else name)
        labelled.add(name)
        if entry.state == "finished":
            finished.append((hours[-1], means[-1]))
    if finished:
        finished.sort()
        end = max(getattr(fold, of) for entry in ledger.entries() for fold in entry.folds)
        best = np.maximum.accumulate([mean for _, mean in finished])
        hours = [*(hour for hour, _ in finished), end]
        axes.step(hours, [*best, best[-1]], where="post", color="#c2571a", lw=2.2, label="best")
    trained = sum(len(entry.folds) for entry in ledger.entries())
    axes.set(
        xlabel=f"{unit}-hours of the train workers",
        ylabel="mean pAUC of the folds so far",
        title=f"{_counts(ledger)}; {trained} of {len(ledger.trials) * ledger.num_folds} folds trained",
    )
    if labelled:
        axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
