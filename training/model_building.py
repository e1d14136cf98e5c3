"""From out-of-fold scores and the refit network to a bundle: fusion, calibration, thresholds, evaluation, reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from data_pipelines.batch_scoring import QUALITY_COLUMNS, ScoredImages, ScoringOptions, score_images
from data_pipelines.image_dataset import DatasetVersion, training_shares
from data_pipelines.synthetic_lesions import parity_images
from data_pipelines.table_scoring import metadata_arrays
from modeling.bundle import write_manifest
from modeling.image_scorer import ImageScorer
from modeling.metadata_fusion import ContextModel, FusionConfig, fit_context_model
from modeling.metrics import evaluate, risk
from modeling.model_card import render_model_card
from modeling.onnx_export import export_onnx, write_parity
from training.config import TrainingConfig

PROJECTION_DIM = 64
PROJECTION_ROWS = 1024


class BuildConfig(BaseModel):
    """What follows the image models."""

    model_config = ConfigDict(extra="forbid")

    fusion: FusionConfig = Field(default_factory=FusionConfig)
    num_bootstrap: int = Field(500, ge=50, le=100_000, description="group resamples behind every interval")
    num_scorers: int = Field(1, ge=1, le=1024)


def build_bundle(
    directory: Path,
    version: DatasetVersion,
    training: TrainingConfig,
    config: BuildConfig,
    scorer: ImageScorer,
    out_of_fold: np.ndarray,
    git_commit: str,
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Writes a complete bundle into the empty folder `directory`.

    Args:
        out_of_fold: log-probabilities float64 (N, K) of the training rows in table order.

    Returns:
        The bundle's digest and the evaluation: context -> {"gate", "out_of_fold", "per_fold"}.
    """
    task = version.task
    directory.mkdir(parents=True, exist_ok=False)
    say("exporting the network to ONNX")
    onnx_path = directory / "image_scorer.onnx"
    export_onnx(scorer, training.model.input_size, onnx_path)
    write_parity(scorer, parity_images(training.model.input_size, seed=0), directory / "parity.npz")

    projection = _fit_projection(version, training, config, onnx_path)
    np.savez_compressed(directory / "projection.npz", matrix=projection[0], mean=projection[1])
    gate_positions = version.gate_positions
    say(f"scoring the {len(gate_positions)} rows of the gate split")
    scored = score_images(
        version.images_path,
        version.rows(gate_positions),
        str(onnx_path),
        training.model.input_size,
        ScoringOptions(with_embedding=True, projection=projection, with_quality=True, num_scorers=config.num_scorers),
    )
    if scored.errors:
        row, reason = next(iter(scored.errors.items()))
        raise ValueError(f"gate image {version.lesions['id'].iloc[gate_positions[row]]}: {reason}")

    evaluation, gate_probabilities = _fit_contexts(directory, version, training, config, out_of_fold, scored, say)
    reference = _reference(version, gate_positions, scored, gate_probabilities)
    reference.to_parquet(directory / "reference.parquet", index=False)

    sampling_prior, population_prior = training_shares(version, version.training_folds, training.sampling)
    fields: dict[str, Any] = {
        "name": task.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": task.model_dump(),
        "input_size": training.model.input_size,
        "backbone": training.model.backbone,
        "embedding_dim": scorer.embedding_dim,
        "modalities": ["image", "metadata"] if task.columns else ["image"],
        "dataset_digest": version.digest,
        "git_commit": git_commit,
        "contexts": list(task.contexts),
        "sampling_prior": sampling_prior.tolist(),
        "population_prior": population_prior.tolist(),
        "training": {"training": training.model_dump(), "build": config.model_dump()},
    }
    card = render_model_card(fields, {context: metrics["gate"] for context, metrics in evaluation.items()})
    (directory / "model_card.md").write_text(card, encoding="utf-8")
    return write_manifest(directory, fields), evaluation


def _fit_contexts(
    directory: Path,
    version: DatasetVersion,
    training: TrainingConfig,
    config: BuildConfig,
    out_of_fold: np.ndarray,
    gate: ScoredImages,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fits, saves and evaluates every context's model; returns the evaluation and gate probabilities (N, K)."""
    task, lesions = version.task, version.lesions
    train = lesions.iloc[version.training_positions]
    held_out = lesions.iloc[version.gate_positions]
    labels, folds = train["label"].to_numpy(np.int64), train["fold"].to_numpy(np.int64)
    sampling_prior, population_prior = training_shares(version, version.training_folds, training.sampling)
    evaluation: dict[str, Any] = {}
    gate_probabilities: dict[str, np.ndarray] = {}
    for context in task.contexts:
        say(f"context {context}: fusion, calibration, thresholds, evaluation")
        groups = train["context"].to_numpy(str) if context == "patient" else train["group"].to_numpy(str)
        model, fused = fit_context_model(
            context,
            task,
            out_of_fold,
            metadata_arrays(train, task),
            labels,
            groups,
            folds,
            config.fusion,
            sampling_prior,
            population_prior,
            training.seed,
        )
        threshold = model.thresholds.threshold

        def measure(table, targets, probabilities, limit=threshold):
            return evaluate(
                task, targets, probabilities, table["group"].to_numpy(str), limit, config.num_bootstrap, training.seed
            )

        gate_probabilities[context] = _predict(model, context, gate.log_probabilities, held_out, version)
        evaluation[context] = {
            "gate": measure(held_out, held_out["label"].to_numpy(np.int64), gate_probabilities[context]),
            "out_of_fold": measure(train, labels, fused),
            "per_fold": [
                measure(train[folds == fold], labels[folds == fold], fused[folds == fold])
                for fold in version.training_folds
            ],
        }
        model.save(directory / "contexts" / context)
        (directory / "contexts" / context / "metrics.json").write_text(
            json.dumps(evaluation[context], indent=1), encoding="utf-8"
        )
    return evaluation, gate_probabilities


def _predict(
    model: ContextModel, context: str, log_probabilities: np.ndarray, lesions: pd.DataFrame, version: DatasetVersion
) -> np.ndarray:
    if context == "image_only":
        return model.predict(log_probabilities, None, None)
    groups = lesions["context"].to_numpy(str) if context == "patient" else None
    return model.predict(log_probabilities, metadata_arrays(lesions, version.task), groups)


def _fit_projection(
    version: DatasetVersion, training: TrainingConfig, config: BuildConfig, onnx_path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes of training embeddings, float32 (D, 64), and their mean (D,): enough to see a shift by.

    With fewer than 64 directions in the sample the remaining columns are zero.
    """
    positions = version.training_positions
    generator = np.random.default_rng(training.seed)
    sample = np.sort(generator.choice(positions, min(PROJECTION_ROWS, len(positions)), replace=False))
    scored = score_images(
        version.images_path,
        version.rows(sample),
        str(onnx_path),
        training.model.input_size,
        ScoringOptions(with_embedding=True, num_scorers=config.num_scorers),
    )
    embedding = scored.embedding[np.isfinite(scored.embedding).all(axis=1)].astype(np.float64)
    mean = embedding.mean(axis=0)
    _, _, axes = np.linalg.svd(embedding - mean, full_matrices=False)
    matrix = np.zeros((embedding.shape[1], PROJECTION_DIM))
    count = min(PROJECTION_DIM, len(axes))
    matrix[:, :count] = axes[:count].T
    return matrix.astype(np.float32), mean.astype(np.float32)


def _reference(
    version: DatasetVersion, positions: np.ndarray, scored: ScoredImages, probabilities: dict[str, np.ndarray]
) -> pd.DataFrame:
    """What the drift report compares a day with: the gate split as this model sees it, without any id."""
    task = version.task
    lesions = version.lesions.iloc[positions]
    table: dict[str, Any] = {
        "group": pd.factorize(lesions["group"])[0].astype(np.int32),
        "label": np.array(task.classes, dtype=object)[lesions["label"].to_numpy(np.int64)],
        "image_score": risk(np.exp(scored.log_probabilities), task),
    }
    for context, values in probabilities.items():
        table[f"risk_{context}"] = risk(values, task)
    table["risk"] = table["risk_none" if "none" in probabilities else "risk_image_only"]
    for name in QUALITY_COLUMNS:
        table[name] = scored.quality[name]
    for axis in range(PROJECTION_DIM):
        table[f"embedding_{axis:02d}"] = scored.embedding[:, axis].astype(np.float32)
    for name in task.columns:
        table[name] = lesions[name].to_numpy()
    return pd.DataFrame(table)
