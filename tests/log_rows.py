"""Rows of the prediction log for tests."""

from __future__ import annotations

from typing import Any


def prediction_row(row_id: str, **values: Any) -> dict[str, Any]:
    """A champion's record; `values` override its columns."""
    base = {
        "id": row_id,
        "idempotency_key": None,
        "received_at": 1_000,
        "caller": "clinic",
        "role": "champion",
        "model_version": "1",
        "context": "none",
        "metadata": {"age_approx": 50.0},
        "abstained": False,
        "reasons": [],
        "stage_ms": {},
    }
    return base | values


def label_row(prediction_id: str, **values: Any) -> dict[str, Any]:
    """A benign label; `values` override its columns."""
    base = {
        "prediction_id": prediction_id,
        "label": "benign",
        "malignant": False,
        "labeller": "x",
        "labelled_at": 1,
    }
    return base | values
