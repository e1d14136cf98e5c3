"""The part of a record that one model answers for; the rest of it says who asked, when, and of what."""

from __future__ import annotations

from typing import Any

import numpy as np

from monitoring.prediction_log import encode_embedding
from serve.lesion_scoring import ScoredLesion
from serve.served_model import ServedModel
from serve.stage_clock import StageClock


def model_columns(lesion: ScoredLesion, model: ServedModel, clock: StageClock) -> dict[str, Any]:
    """Columns of `PredictionRecord` by name: the version, its scores and verdict, and what it saw and took."""
    scores, risk, reasons = lesion.scores, lesion.risk, lesion.reasons
    return {
        "model_version": model.reference.version,
        "context": risk.context,
        "image_score": float(np.exp(scores.log_probabilities[0])[model.task.malignant_mask].sum()),
        "class_probabilities": risk.class_probabilities,
        "risk": None if reasons else risk.risk,
        "band": None if reasons else risk.band,
        "threshold": risk.threshold,
        "abstained": bool(reasons),
        "reasons": reasons,
        "embedding": encode_embedding(scores.projections[0]),
        "stage_ms": clock.stages(),
        **lesion.image.quality,
    }
