"""The card states limits, never hides that data were synthetic, and shows intervals."""

from __future__ import annotations

import pytest

from modeling.model_card import render_model_card
from tests.tiny_bundle import GATE_METRICS, tiny_task


def fields(**changes):
    return {
        "name": "tiny",
        "task": tiny_task().model_dump(),
        "input_size": 16,
        "backbone": "linear",
        "embedding_dim": 8,
        "modalities": ["image", "metadata"],
        "dataset_digest": "d" * 64,
        "git_commit": "abc123",
        "contexts": ["image_only", "none"],
        "sampling_prior": [0.5, 0.5],
        "population_prior": [0.9, 0.1],
    } | changes


METRICS = {"image_only": GATE_METRICS, "none": GATE_METRICS | {"sensitivity": None}}


def test_the_card_says_what_a_reader_must_know():
    card = render_model_card(fields(), METRICS)
    assert "Not a medical device" in card
    assert "SYNTHETIC" in card and "Never use this model on people" in card
    assert "0.900 (0.860-0.940)" in card
    assert "| sensitivity at the operating threshold | 0.950 | not measurable |" in card
    assert "| recall of malignant | 0.950 | 0.950 |" in card
    assert "| benign | no | 0.9000 | 0.5000 |" in card
    for text in ("abc123", "d" * 64, "`patient_id`", "## Intended use", "## Limits"):
        assert text in card


def test_real_data_carries_no_synthetic_banner():
    card = render_model_card(fields(task=tiny_task(synthetic=False).model_dump()), METRICS)
    assert "SYNTHETIC" not in card and "synthetic" not in card


def test_few_cancers_are_pointed_out():
    few = {context: metrics | {"n_malignant": 7} for context, metrics in METRICS.items()}
    assert "Only 7 malignant lesions" in render_model_card(fields(), few)
    assert "Only" not in render_model_card(fields(), METRICS)


def test_a_context_without_metrics_is_refused():
    with pytest.raises(ValueError, match="no metrics for contexts \\['none'\\]"):
        render_model_card(fields(), {"image_only": GATE_METRICS})


def test_unseen_institutions_have_a_table():
    row = {
        "institution": "Vienna",
        "n": 120,
        "n_malignant": 24,
        "seen": {"auc": 0.9, "pauc": 0.15},
        "unseen": {"auc": 0.85, "pauc": 0.12},
        "difference": {"auc": {"value": -0.05, "low": -0.08, "high": -0.02}, "pauc": {"value": -0.03}},
    }
    card = render_model_card(fields(), METRICS, institutions=[row])
    assert "| Vienna | 120 (24) | 0.900 | 0.850 | -0.050 (-0.080 to -0.020) |" in card
    assert "network that scored the pictures had seen" in card
    assert "has not seen" not in render_model_card(fields(), METRICS)


def test_the_card_says_which_pictures_are_not_scored():
    def counts(n, refused):
        return {"n": n, "refused": refused, "share": refused / n if n else None, "low": 0.001, "high": 0.02}

    kinds = [("clouds", "non_lesion", False, 0.9), ("wood", "non_lesion", True, 0.4), ("text", "non_lesion", True, 1.0)]
    gate = {"all": counts(1000, 5), "malignant": counts(0, 0), "benign": counts(1000, 5)}
    rows = [{"kind": kind, "set": group, "held_out": held, "share": share} for kind, group, held, share in kinds]
    card = render_model_card(fields(), METRICS, abstention={"gate": gate, "kinds": rows})
    assert "| usable: lesions of the gate split | 0.5% (0.1%-2.0%) of 1000 |  |" in card
    assert "| usable: malignant ones | none there |  |" in card
    assert "| unusable: no lesion, 2 kinds held out | 70.0% | wood: 40% |" in card
    assert "Pictures it does not score" not in render_model_card(fields(), METRICS)
