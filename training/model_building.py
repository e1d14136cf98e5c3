"""From out-of-fold scores and the refit network to a bundle: fusion, calibration, thresholds, evaluation, reference.
Without a network the bundle scores metadata alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipelines.batch_scoring import QUALITY_COLUMNS, ScoredImages, ScoringOptions, score_images
from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.synthetic_lesions import parity_images
from modeling.abstention import AbstentionRule
from modeling.bundle import write_manifest
from modeling.bundle_manifest import IMAGE_SCORER, PARITY, PROJECTION
from modeling.image_scorer import ExportableScorer
from modeling.metrics import risk
from modeling.model_card import render_model_card
from modeling.onnx_export import export_onnx, write_parity
from modeling.onnxruntime_engine import OnnxRuntimeEngine
from training.config import BuildConfig, TrainingConfig
from training.context_models import ContextResults, fit_contexts, priors
from training.ood_report import OodReport, false_refusals, measure_kinds, some_pictures

PROJECTION_DIM = 64
_BATCH = 32
# Of 64 axes and of limits that one picture in a hundred passes; more would only cost time.
SAMPLE_ROWS = 2048


def build_bundle(
    directory: Path,
    version: DatasetVersion,
    training: TrainingConfig,
    config: BuildConfig,
    scorer: ExportableScorer | None,
    out_of_fold: np.ndarray | None,
    git_commit: str,
    say: Callable[[str], None],
) -> tuple[str, ContextResults]:
    """Writes a complete bundle into the empty folder `directory`.

    Args:
        scorer: the network or networks that are served; None for a data set without pictures.
        out_of_fold: log-probabilities float64 (N, K) of the training rows in table order; None without a network.

    Returns:
        The bundle's digest and what was measured.
    """
    task = version.task
    directory.mkdir(parents=True, exist_ok=False)
    scored, rule = None, None
    if scorer is not None:
        scored, rule = _export_and_score_gate(directory, version, training, config, scorer, say)
    gate_images = None if scored is None else scored.log_probabilities
    results = fit_contexts(directory, version, training, config, out_of_fold, gate_images, say)
    if rule is not None and scored is not None:
        results.ood = _try_abstention(directory, version, training, config, rule, scored, say)
        replace(rule, measured=results.ood.measured).save(directory)
    reference = _reference(version, version.gate_positions, scored, results.gate_probabilities, rule)
    reference.to_parquet(directory / "reference.parquet", index=False)

    sampling_prior, population_prior = priors(version, training, config.prevalence)
    settings = {"training": training.model_dump()} if scorer is not None else {"seed": training.seed}
    fields: dict[str, Any] = {
        "name": task.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": task.model_dump(),
        "input_size": 0 if scorer is None else training.model.input_size,
        "backbone": "none" if scorer is None else training.model.backbone,
        "embedding_dim": 0 if scorer is None else scorer.embedding_dim,
        "modalities": [*(["image"] if scorer is not None else []), *(["metadata"] if task.columns else [])],
        "dataset_digest": version.digest,
        "git_commit": git_commit,
        "contexts": list(results.evaluation),
        "sampling_prior": sampling_prior.tolist(),
        "population_prior": population_prior.tolist(),
        "training": {**settings, "build": config.model_dump()},
    }
    gate = {context: report["gate"] for context, report in results.evaluation.items()}
    clinical = {context: report["clinical"] for context, report in results.evaluation.items()}
    notes = [note for report in results.evaluation.values() for note in report["notes"]]
    abstention = None if results.ood is None else results.ood.measured
    institutions = results.comparison["institutions"]
    card = render_model_card(fields, gate, clinical, institutions=institutions, notes=notes, abstention=abstention)
    (directory / "model_card.md").write_text(card, encoding="utf-8")
    return write_manifest(directory, fields), results


def _export_and_score_gate(
    directory: Path,
    version: DatasetVersion,
    training: TrainingConfig,
    config: BuildConfig,
    scorer: ExportableScorer,
    say: Callable[[str], None],
) -> tuple[ScoredImages, AbstentionRule | None]:
    """Writes the network with its parity check and projection into the bundle; scores the gate split with it. The rule
    is fitted on training pictures alone."""
    say("exporting the network to ONNX")
    onnx_path = directory / IMAGE_SCORER
    export_onnx(scorer, training.model.input_size, onnx_path)
    write_parity(scorer, parity_images(training.model.input_size, seed=0), directory / PARITY)

    positions, sample = _score_sample(version, training, config, onnx_path)
    projection = _fit_projection(sample.embedding)
    np.savez_compressed(directory / PROJECTION, matrix=projection[0], mean=projection[1])
    groups = version.lesions["group"].to_numpy(str)[positions]
    rule = AbstentionRule.fit(sample.quality, sample.embedding, groups, training.seed)
    if rule is None:
        say(f"no abstention rule: {len(sample.row)} training pictures are too few to know what is unusual")
    gate_positions = version.gate_positions
    say(f"scoring the {len(gate_positions)} rows of the gate split")
    scored = score_images(
        version.images_path,
        version.rows(gate_positions),
        str(onnx_path),
        training.model.input_size,
        ScoringOptions(
            with_embedding=True,
            projection=projection,
            distance=None if rule is None else rule.distance,
            with_quality=True,
            num_scorers=config.num_scorers,
        ),
    )
    if scored.errors:
        row, reason = next(iter(scored.errors.items()))
        raise ValueError(f"gate image {version.lesions['id'].iloc[gate_positions[row]]}: {reason}")
    return scored, rule


def _score_sample(
    version: DatasetVersion, training: TrainingConfig, config: BuildConfig, onnx_path: Path
) -> tuple[np.ndarray, ScoredImages]:
    """Training rows drawn at random, int64 (M,), and their pictures through the exported graph: the function that is
    served."""
    positions = version.training_positions
    generator = np.random.default_rng(training.seed)
    sample = np.sort(generator.choice(positions, min(SAMPLE_ROWS, len(positions)), replace=False))
    scored = score_images(
        version.images_path,
        version.rows(sample),
        str(onnx_path),
        training.model.input_size,
        ScoringOptions(with_embedding=True, with_quality=True, num_scorers=config.num_scorers),
    )
    return sample, scored


def _fit_projection(embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes of training embeddings (N, D), float32 (D, 64), and their mean (D,): enough to see a shift by.

    With fewer than 64 directions in the sample the remaining columns are zero.
    """
    embedding = embedding[np.isfinite(embedding).all(axis=1)].astype(np.float64)
    mean = embedding.mean(axis=0)
    _, _, axes = np.linalg.svd(embedding - mean, full_matrices=False)
    matrix = np.zeros((embedding.shape[1], PROJECTION_DIM))
    count = min(PROJECTION_DIM, len(axes))
    matrix[:, :count] = axes[:count].T
    return matrix.astype(np.float32), mean.astype(np.float32)


def _try_abstention(
    directory: Path,
    version: DatasetVersion,
    training: TrainingConfig,
    config: BuildConfig,
    rule: AbstentionRule,
    scored: ScoredImages,
    say: Callable[[str], None],
) -> OodReport:
    """What the rule refuses: of the gate split, which it has not seen, and of unusable pictures."""
    positions, number = version.gate_positions, config.ood_pictures
    report = OodReport({"kinds": []})
    if number:
        say(f"unusable pictures: {number} of each kind")
        engine = OnnxRuntimeEngine(directory / IMAGE_SCORER)

        def embed(images: np.ndarray) -> np.ndarray:
            batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
            return np.concatenate([engine.run(batch).embedding for batch in batches])

        lesions = some_pictures(version, positions, number, training.seed)
        report = measure_kinds(rule, embed, training.model.input_size, lesions, number, training.seed)
    malignant = version.task.malignant_mask[version.lesions["label"].to_numpy(np.int64)[positions]]
    groups = version.lesions["group"].to_numpy(str)[positions]
    report.measured = {"gate": false_refusals(rule, scored, malignant, groups), **report.measured}
    return report


def _reference(
    version: DatasetVersion,
    positions: np.ndarray,
    scored: ScoredImages | None,
    probabilities: dict[str, np.ndarray],
    rule: AbstentionRule | None = None,
) -> pd.DataFrame:
    """What the drift report compares a day with: the gate split as this model sees it, without any id."""
    task = version.task
    lesions = version.lesions.iloc[positions]
    table: dict[str, Any] = {
        "group": pd.factorize(lesions["group"])[0].astype(np.int32),
        "label": np.array(task.classes, dtype=object)[lesions["label"].to_numpy(np.int64)],
    }
    if scored is not None:
        table["image_score"] = risk(np.exp(scored.log_probabilities), task)
    for context, values in probabilities.items():
        table[f"risk_{context}"] = risk(values, task)
    table["risk"] = table["risk_none" if "none" in probabilities else "risk_image_only"]
    if scored is not None:
        table |= {name: scored.quality[name] for name in QUALITY_COLUMNS}
        table |= {
            f"embedding_{axis:02d}": scored.embedding[:, axis].astype(np.float32) for axis in range(PROJECTION_DIM)
        }
    if scored is not None and rule is not None and scored.distance is not None:
        refused = rule.refusals(scored.quality, scored.distance)
        # Named as the log names them: a day's share of abstentions is compared with this.
        table["abstention"] = ["+".join(sorted({found.reason for found in row})) or "answered" for row in refused]
    if task.institution_column is not None:
        table["institution"] = lesions[task.institution_column].to_numpy()
    for name in task.columns:
        table[name] = lesions[name].to_numpy()
    return pd.DataFrame(table)
