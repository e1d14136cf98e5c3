"""Is a faster engine still the same model? Differences from torch's recorded answers and, on real lesions of the gate
split, from the float32 network: discrimination, sensitivity at the operating point, abstention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.bundle import Bundle
from modeling.engine_interface import Engine
from modeling.metrics import partial_auc_above_tpr, risk, roc_auc
from modeling.recorded_answers import Parity, check_output, softmax
from modeling.resampling import clustered_bootstrap

_BATCH = 32
_Z = 1.959964


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ParityLimits(_Record):
    """Largest differences that a candidate may show.

    The first three are from torch's float32 answers on the bundle's recorded pictures and hold for float32 engines;
    `batches` is between batch sizes of one engine; the others are from the float32 network on lesions of the gate
    split. These hold for every engine.
    """

    probability: float = Field(1e-3, gt=0, description="absolute, any class probability")
    logit: float = Field(1e-2, gt=0, description="absolute")
    embedding: float = Field(1e-2, gt=0, description="relative to the largest reference value")
    batches: float = Field(1e-2, gt=0, description="absolute, any class probability in batches of another size")
    auc: float = Field(1e-3, gt=0, description="absolute, of the image-only risk")
    pauc: float = Field(2e-3, gt=0, description="absolute, area above 80 % sensitivity")
    mean_probability: float = Field(2e-2, gt=0, description="mean over lesions of the largest class's difference")
    refusals: float = Field(5e-3, gt=0, description="share of the pictures that only one of both abstains from")


class LesionParity(_Record):
    """How an engine's answers on N lesions compare with the float32 network's.

    Attributes:
        probability: largest difference of any class probability.
        mean_probability: mean over lesions of the largest difference of a class probability. It shows what AUC cannot:
            a network with all its logits doubled ranks lesions the same.
        rank_correlation: Spearman's, of the image-only risks.
        delta_auc, delta_pauc: the engine's minus the reference's; None where a class is absent.
        sensitivity, reference_sensitivity: at the operating point; None without malignant lesions.
        sensitivity_noise: standard error of the reference's, by bootstrap of the groups; None where undefined.
        refusals: share of the pictures that only one of both abstains from; None without an abstention rule.
    """

    n: int
    n_malignant: int
    probability: float
    mean_probability: float
    rank_correlation: float | None
    delta_auc: float | None
    delta_pauc: float | None
    sensitivity: float | None
    reference_sensitivity: float | None
    sensitivity_noise: float | None
    refusals: float | None


@dataclass(frozen=True)
class Lesions:
    """Lesions that trained nothing, to compare engines on.

    Attributes:
        images: uint8 (N, S, S, 3), as the network reads them.
        malignant: bool (N,).
        groups: (N,), patients or lesions: rows of one are not independent.
    """

    images: np.ndarray
    malignant: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class LesionScores:
    """An engine's answers on N lesions.

    Attributes:
        probabilities: softmax of the logits, float64 (N, K).
        risk: of the image-only context, as it is served, float64 (N,).
        unlike_training: bool (N,), too far from the training pictures to be scored; None without an abstention rule.
    """

    probabilities: np.ndarray
    risk: np.ndarray
    unlike_training: np.ndarray | None


def score_lesions(
    engine: Engine, bundle: Bundle, lesions: Lesions, progress: Callable[[int], None] = lambda done: None
) -> LesionScores:
    """What an engine makes of the lesions; `progress` is told after each batch how many are done.

    Raises:
        ValueError: an output of the wrong shape or with values that are not finite.
    """
    rule = bundle.abstention()
    logits, distances = [], []
    for start in range(0, len(lesions.images), _BATCH):
        images = lesions.images[start : start + _BATCH]
        output = engine.run(images, with_cam=True)
        check_output(output, len(images), bundle.task.num_classes, bundle.manifest.embedding_dim)
        logits.append(output.logits.astype(np.float64))
        if rule is not None:
            distances.append(rule.distance(output.embedding))
        progress(start + len(images))
    probabilities = softmax(np.concatenate(logits))
    if "image_only" in bundle.manifest.contexts:
        log_probabilities = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
        risks = risk(bundle.contexts["image_only"].predict(log_probabilities), bundle.task)
    else:
        risks = risk(probabilities, bundle.task)
    unlike = None if rule is None else ~(np.concatenate(distances) <= rule.max_distance)
    return LesionScores(probabilities, risks, unlike)


def compare_on_lesions(
    bundle: Bundle, lesions: Lesions, scores: LesionScores, reference: LesionScores, seed: int = 0
) -> LesionParity:
    """An engine's answers beside the reference's on the same lesions."""
    from scipy.stats import spearmanr

    malignant = np.asarray(lesions.malignant, dtype=bool)
    both = bool(malignant.any()) and not bool(malignant.all())
    values: dict[str, float | None] = dict.fromkeys(
        ("delta_auc", "delta_pauc", "sensitivity", "reference_sensitivity", "sensitivity_noise", "rank_correlation")
    )
    if both:
        values["delta_auc"] = roc_auc(malignant, scores.risk) - roc_auc(malignant, reference.risk)
        values["delta_pauc"] = partial_auc_above_tpr(malignant, scores.risk) - partial_auc_above_tpr(
            malignant, reference.risk
        )
    if malignant.any() and "image_only" in bundle.manifest.contexts:
        threshold = bundle.contexts["image_only"].thresholds.threshold
        found = (reference.risk >= threshold)[malignant]
        values["reference_sensitivity"] = float(found.mean())
        values["sensitivity"] = float((scores.risk >= threshold)[malignant].mean())
        low, high = clustered_bootstrap(lambda rows: float(found[rows].mean()), lesions.groups[malignant], seed=seed)
        values["sensitivity_noise"] = float(high - low) / (2 * _Z)
    if len(np.unique(scores.risk)) > 1 and len(np.unique(reference.risk)) > 1:
        values["rank_correlation"] = float(spearmanr(scores.risk, reference.risk).statistic)
    largest = np.abs(scores.probabilities - reference.probabilities).max(axis=1)
    refusals = None
    if scores.unlike_training is not None and reference.unlike_training is not None:
        refusals = float(np.mean(scores.unlike_training != reference.unlike_training))
    return LesionParity(
        n=len(malignant),
        n_malignant=int(malignant.sum()),
        probability=float(largest.max()),
        mean_probability=float(largest.mean()),
        refusals=refusals,
        **{name: None if value is None or math.isnan(value) else value for name, value in values.items()},
    )


def differences(parity: Parity, limits: ParityLimits, float32: bool) -> list[str]:
    """Why an engine is refused by its answers on the recorded pictures; empty where it is not."""
    return [
        f"{name} differs by {value:.2g}, limit {getattr(limits, name):.2g}"
        for name, value in parity.model_dump().items()
        if value > getattr(limits, name) and (float32 or name == "batches")
    ]


def lesion_differences(parity: LesionParity, limits: ParityLimits, float32: bool) -> list[str]:
    """Why an engine is refused by its answers on real lesions; empty where it is not. Float32 engines are held to the
    recorded answers as well, so lesions of one kind, which have no AUC, do not refuse them."""
    if (parity.delta_auc is None or parity.delta_pauc is None) and not float32:
        return [f"no AUC of {parity.n} lesions, {parity.n_malignant} of them malignant"]
    found = [
        f"{name} differs by {value:+.2g}, limit {limit:.2g}"
        for name, value, limit in (
            ("AUC", parity.delta_auc, limits.auc),
            ("pAUC", parity.delta_pauc, limits.pauc),
            ("mean probability", parity.mean_probability, limits.mean_probability),
            ("abstention", parity.refusals, limits.refusals),
        )
        if value is not None and abs(value) > limit
    ]
    if parity.sensitivity is not None and parity.reference_sensitivity is not None:
        lost, noise = parity.reference_sensitivity - parity.sensitivity, parity.sensitivity_noise or 0.0
        if lost > noise:
            found.append(
                f"sensitivity is {parity.sensitivity:.3f} at the operating point, float32's is "
                f"{parity.reference_sensitivity:.3f} with a standard error of {noise:.3f}"
            )
    return found
