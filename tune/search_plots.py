"""The pictures and the table of a search: trials over their hyperparameters, what mattered, what the best one cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.figures import headless_pyplot
from tune.parallel_coordinates import plot_parallel_coordinates
from tune.search_importance import plot_importance
from tune.search_ledger import SearchLedger, outcomes_line
from tune.search_space import SearchSpace


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


def plot_best_over_cost(path: Path, ledger: SearchLedger) -> None:
    """Draws each trial's mean over its folds as they came, and the best finished mean, against the workers' hours."""
    pyplot = headless_pyplot()
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
        title=f"{outcomes_line(ledger)}; {trained} of {len(ledger.trials) * ledger.num_folds} folds trained",
    )
    if labelled:
        axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
