"""How often the promotion gate's paired rules let a model pass that is as good as the champion, or truly worse.

Scores are drawn from normal distributions: both models share a part of what they see (correlation 0.85 among lesions of
one kind), the champion has AUC 0.92, and each operating threshold is chosen for 95 % sensitivity on training lesions of
its own, 85 of 100 as where the gate split holds 15. A worse candidate has the pAUC of one with a lower AUC.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from modeling.metrics import partial_auc_above_tpr
from modeling.operating_points import choose_thresholds
from modeling.paired_comparison import ModelRisks, PairedComparison, compare_models
from monitoring.gate_comparison import paired_lines
from monitoring.gate_rules import GateRules

_CHAMPION_AUC, _CORRELATION, _BENIGN = 0.92, 0.85, 1500
_TRAINING = 85 / 15


def _scores(rng: np.random.Generator, malignant: np.ndarray, aucs: tuple[float, float]) -> list[np.ndarray]:
    shared = rng.normal(size=len(malignant))
    return [
        np.sqrt(_CORRELATION) * shared
        + np.sqrt(1 - _CORRELATION) * rng.normal(size=len(malignant))
        + NormalDist().inv_cdf(auc) * np.sqrt(2) * malignant
        for auc in aucs
    ]


def _draws(cancers: int, candidate_auc: float, number: int, resamples: int, seed: int) -> Iterator[PairedComparison]:
    rng = np.random.default_rng([seed, cancers, round(1000 * candidate_auc)])
    aucs = (candidate_auc, _CHAMPION_AUC)
    gate = np.arange(cancers + _BENIGN) < cancers
    train = np.arange(round(_TRAINING * (cancers + _BENIGN))) < round(_TRAINING * cancers)
    for _ in range(number):
        models = [
            ModelRisks(scores, choose_thresholds(train, own, [], 0.95).threshold)
            for scores, own in zip(_scores(rng, gate, aucs), _scores(rng, train, aucs), strict=True)
        ]
        yield compare_models(gate, np.arange(len(gate)), *models, num_bootstrap=resamples)


def _true_pauc(auc: float) -> float:
    malignant = np.arange(200_000) < 100_000
    return partial_auc_above_tpr(malignant, _scores(np.random.default_rng(0), malignant, (auc, auc))[0])


def measure(cancers: int, candidate_auc: float, draws: int, resamples: int, seed: int) -> dict:
    """Shares of the draws in which each paired rule, and all of them, pass."""
    passed: dict[str, list[bool]] = {}
    drops = []
    for comparison in _draws(cancers, candidate_auc, draws, resamples, seed):
        lines = list(paired_lines(GateRules(), "none", comparison))
        for line in lines:
            passed.setdefault(line.rule, []).append(line.passed)
        passed.setdefault("all", []).append(all(line.passed for line in lines))
        drops.append(comparison.pauc.value)
    return {
        "cancers": cancers,
        "candidate_auc": candidate_auc,
        "sd_of_pauc_difference": round(float(np.std(drops)), 4),
        "passed": {rule: round(float(np.mean(verdicts)), 2) for rule, verdicts in passed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancers", type=int, nargs="+", default=[30, 60, 120, 240])
    parser.add_argument("--candidate-auc", type=float, nargs="+", default=[0.92, 0.88])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = [
        measure(cancers, auc, arguments.draws, arguments.resamples, arguments.seed)
        for auc in arguments.candidate_auc
        for cancers in arguments.cancers
    ]
    paucs = {str(auc): round(_true_pauc(auc), 4) for auc in {_CHAMPION_AUC, *arguments.candidate_auc}}
    print(json.dumps({"champion_auc": _CHAMPION_AUC, "pauc": paucs, "rows": rows}))


if __name__ == "__main__":
    main()
