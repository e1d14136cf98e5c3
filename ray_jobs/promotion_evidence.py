"""What the promotion gate judges beside the bundles themselves: both models on the same lesions, engines, shadow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.gate_scoring import find_version, gate_risks, trained_on, why_not_scored
from data_pipelines.image_dataset import DatasetVersion
from modeling.bundle import Bundle, load_bundle
from modeling.engine_set import engine_sets
from modeling.metrics import roc_auc
from modeling.paired_comparison import ModelRisks, PairedComparison, compare_models
from modeling.registry import ModelVersion
from monitoring.promotion_gate import Evidence, GateRules
from ray_jobs.job import connect_ray, say
from store.database import Store
from store.shadow_agreement import ShadowAgreement, shadow_agreement
from store.tables import now_us

if TYPE_CHECKING:
    from ray_jobs.promote_model import PromoteModelConfig

_DAY_US = 86_400_000_000


def open_champion(found: ModelVersion | None) -> Bundle | None:
    """The champion's bundle, verified; None before the first promotion.

    Raises:
        ValueError: it is gone or damaged.
    """
    if found is None:
        return None
    try:
        return load_bundle(found.uri, found.digest)
    except ValueError as error:
        raise ValueError(
            f"champion version {found.version} cannot be compared with: {error}; restore it, or --rollback first"
        ) from error


def gather_evidence(
    config: PromoteModelConfig,
    target: ModelVersion,
    candidate: Bundle,
    found: ModelVersion | None,
    champion: Bundle | None,
    store: Store,
) -> tuple[Evidence, list[str]]:
    """Everything but the bundles, and sentences about how it came to be.

    Args:
        target, found: the candidate's and the champion's version; None with `champion` before the first promotion.

    Raises:
        ValueError: the data set does not hold the candidate's version, or cannot be read.
    """
    own = engine_sets(config.engine_sets, candidate.digest)
    if found is None or champion is None:
        return Evidence(engine_sets=own), ["No champion yet: absolute limits only."]
    notes: list[str] = []
    pairing: dict = {}
    if config.dataset is not None:
        pairing, notes = _paired(config, config.dataset, candidate, champion)
    evidence = Evidence(
        engine_sets=own,
        champion_engine_sets=engine_sets(config.engine_sets, champion.digest),
        shadow=_shadow(store, found, target, config.rules),
        **pairing,
    )
    return evidence, notes


def _paired(config: PromoteModelConfig, location: str, candidate: Bundle, champion: Bundle) -> tuple[dict, list[str]]:
    """Fields of `Evidence` about the same lesions, and notes."""
    version = find_version(location, candidate.manifest.dataset_digest)
    if version is None:
        raise ValueError(
            f"dataset {location} holds no version {candidate.manifest.dataset_digest[:12]}, which the candidate was "
            "trained on; expected the data set's folder"
        )
    reason = why_not_scored(champion, version)
    if reason:
        say(f"the champion cannot be scored on {version.path}: {reason}")
        return {"unpaired": f"the champion cannot be scored on the data set: {reason}"}, []
    folder = Path(config.gate_scores)
    risks = [
        gate_risks(bundle, version, folder, config.num_scorers, connect_ray, say) for bundle in (candidate, champion)
    ]
    seen, notes = _seen_by(champion, version, location)
    if seen.all():
        return {"unpaired": "the champion was trained on every lesion of the gate split"}, notes
    malignant = version.task.malignant_mask[version.lesions["label"].to_numpy(np.int64)[version.gate_positions]]
    aucs = {context: roc_auc(malignant, values) for context, values in risks[0].items()}
    wanted = config.rules.contexts or candidate.manifest.contexts
    comparisons = {}
    for context in wanted:
        if context in risks[0] and context in risks[1]:
            say(f"context {context}: {config.num_bootstrap} resamples of both models on {(~seen).sum()} lesions")
            comparisons[context] = _compare(config, version, context, ~seen, (candidate, champion), risks)
    pairing = {
        "comparisons": comparisons,
        "unpaired": "the models share no context",
        "gate_auc": {context: value for context, value in aucs.items() if np.isfinite(value)},
        "dataset_digest": version.digest,
    }
    return pairing, notes


def _seen_by(champion: Bundle, version: DatasetVersion, location: str) -> tuple[np.ndarray, list[str]]:
    """bool (N,): gate rows that trained the champion, as far as its data set is still there."""
    seen = np.zeros(len(version.gate_positions), dtype=bool)
    digest = champion.manifest.dataset_digest
    if digest == version.digest:
        return seen, ["Both models were trained on this version of the data set."]
    try:
        earlier = find_version(location, digest)
        reason = "is not there"
    except ValueError as error:
        earlier, reason = None, f"cannot be read ({error})"
    if earlier is None:
        note = (
            f"The champion's data set version {digest[:12]} {reason}: that no lesion of this gate split trained it "
            "rests on group ids that have not changed."
        )
    else:
        seen = trained_on(earlier, version)
        note = f"{int(seen.sum())} of {len(seen)} gate lesions left out: they, or their group, trained the champion."
    say(note)
    return seen, [note]


def _compare(
    config: PromoteModelConfig,
    version: DatasetVersion,
    context: str,
    rows: np.ndarray,
    bundles: tuple[Bundle, Bundle],
    risks: list[dict[str, np.ndarray]],
) -> PairedComparison:
    # Imported late: it brings what training needs.
    from training.clinical_report import subgroup_columns

    lesions = version.lesions.iloc[version.gate_positions][rows]
    candidate, champion = (
        ModelRisks(values[context][rows], bundle.contexts[context].thresholds.threshold)
        for bundle, values in zip(bundles, risks, strict=True)
    )
    return compare_models(
        version.task.malignant_mask[lesions["label"].to_numpy(np.int64)],
        lesions["group"].to_numpy(str),
        candidate,
        champion,
        subgroup_columns(version.task, lesions),
        config.num_bootstrap,
        config.seed,
    )


def _shadow(store: Store, champion: ModelVersion, candidate: ModelVersion, rules: GateRules) -> ShadowAgreement:
    """What the candidate said beside this champion; a shadow may also have been deployed by its bundle's path."""
    since = now_us() - rules.shadow.days * _DAY_US
    names = (candidate.version, f"bundle-{candidate.digest[:12]}")
    return max((shadow_agreement(store, champion.version, name, since) for name in names), key=lambda each: each.pairs)
