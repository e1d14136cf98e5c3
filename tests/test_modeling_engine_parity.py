"""A faster engine that is another model is refused, with the figure that shows it."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.engine_parity import (
    Lesions,
    ParityLimits,
    compare_on_lesions,
    lesion_differences,
    score_lesions,
)
from modeling.engine_selection import measure_candidates
from modeling.engine_set import Candidate
from modeling.engines import create_engine
from modeling.network_precision import Int8Recipe, cpu_activations, write_int8
from tests.broken_networks import changed, four_bits, int8_network
from tests.tiny_bundle import SIZE, expected_outputs, tiny_bundle

FLOAT = Candidate(name="cpu", choice={"engine": "onnxruntime", "options": {"threads": 1}})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def lesions():
    """Uniform pictures of skin's colours, malignant the more often the higher the network's logit is."""
    rng = np.random.default_rng(3)
    colours = rng.normal((180, 140, 120), 25, (600, 1, 1, 3)) + rng.normal(0, 4, (600, SIZE, SIZE, 3))
    images = np.clip(colours, 0, 255).astype(np.uint8)
    logits, _ = expected_outputs(images)
    score = logits[:, 1] - logits[:, 0]
    score = (score - np.median(score)) / score.std()
    return Lesions(images, rng.random(600) < 1 / (1 + np.exp(1 - 2 * score)), np.arange(600) // 2)


def blue_first(name, value):
    return value[:, ::-1].copy() if name == "mixing" else value


def doubled_scale(name, value):
    return 2 * value if name == "scale" else value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (four_bits, "AUC differs by"),
        (blue_first, "AUC differs by"),
        (doubled_scale, "mean probability differs by"),
    ],
)
def test_a_broken_candidate_is_refused_however_fast(bundle, lesions, tmp_path, change, reason):
    broken = changed(bundle, tmp_path / f"{change.__name__}.onnx", change)
    engine_set = measure_candidates(bundle, [broken, FLOAT], lesions, rounds=1)
    report = engine_set.candidates[0]
    assert not report.passed and reason in report.reason
    assert report.ms_per_image == {} and set(engine_set.chosen.values()) == {"cpu"}


def test_doubled_logits_have_the_same_auc_and_are_refused_all_the_same(bundle, lesions, tmp_path):
    doubled = changed(bundle, tmp_path / "doubled.onnx", doubled_scale)
    report = measure_candidates(bundle, [doubled], lesions, rounds=1).candidates[0]
    assert abs(report.lesions.delta_auc) < 1e-9 and not report.passed


def test_a_good_int8_network_passes(bundle, lesions, tmp_path):
    write_int8(bundle.onnx_path, tmp_path / "int8.onnx", lesions.images[:64], Int8Recipe(), cpu_activations())
    choice = {"engine": "onnxruntime", "network": int8_network(tmp_path / "int8.onnx")}
    limits = ParityLimits(auc=0.005, pauc=0.005)
    engine_set = measure_candidates(
        bundle, [Candidate(name="int8", choice=choice, precision="int8")], lesions, rounds=1, limits=limits
    )
    report = engine_set.candidates[0]
    assert report.passed, report.reason
    assert report.lesions.n == 600 and report.lesions.rank_correlation > 0.99
    assert 0 < report.lesions.probability
    assert create_engine(bundle, engine_set.choice).name == "onnxruntime-cpu-1-int8"


def test_without_lesions_no_reduced_precision_passes(bundle, tmp_path):
    same = changed(bundle, tmp_path / "same.onnx", lambda name, value: value)
    engine_set = measure_candidates(bundle, [same, FLOAT], rounds=1)
    assert [report.passed for report in engine_set.candidates] == [False, True]
    assert "no lesions of a gate split" in engine_set.candidates[0].reason


def test_lesions_of_one_kind_prove_nothing(bundle, lesions, tmp_path):
    benign = Lesions(lesions.images[:50], np.zeros(50, bool), np.arange(50))
    same = changed(bundle, tmp_path / "same.onnx", lambda name, value: value)
    report, float32 = measure_candidates(bundle, [same, FLOAT], benign, rounds=1).candidates
    assert not report.passed and "no AUC of 50 lesions, 0 of them malignant" in report.reason
    assert float32.passed  # torch's recorded answers hold it


def test_a_refused_int8_network_gets_one_better_try(bundle, lesions, tmp_path):
    broken = changed(bundle, tmp_path / "broken.onnx", four_bits)
    asked = []

    def better(refused):
        asked.append([candidate.name for candidate in refused])
        return [changed(bundle, tmp_path / "better.onnx", lambda name, value: value)]

    engine_set = measure_candidates(bundle, [broken, FLOAT], lesions, rounds=1, better_try=better)
    assert asked == [["broken"]]
    assert [report.passed for report in engine_set.candidates] == [False, True, True]
    measure_candidates(bundle, [FLOAT], lesions, rounds=1, better_try=better)
    assert len(asked) == 1


def test_lost_sensitivity_counts_against_its_standard_error(bundle, lesions, monkeypatch):
    engine = create_engine(bundle)
    scores = score_lesions(engine, bundle, lesions)
    model = bundle.contexts["image_only"]
    operating = float(np.quantile(scores.risk[lesions.malignant], 0.1))
    monkeypatch.setattr(model, "thresholds", model.thresholds.model_copy(update={"threshold": operating}))
    same = compare_on_lesions(bundle, lesions, scores, scores)
    assert lesion_differences(same, ParityLimits(), False) == []
    assert (same.delta_auc, same.delta_pauc, same.mean_probability, same.probability) == (0, 0, 0, 0)
    expected = np.sqrt(same.sensitivity * (1 - same.sensitivity) / same.n_malignant)
    # Lesions of a pair mostly fall on their own, so pairs vary about as independent lesions do.
    assert same.sensitivity_noise == pytest.approx(expected, rel=0.4)
    inside = same.model_copy(update={"sensitivity": same.sensitivity - 0.9 * same.sensitivity_noise})
    beyond = same.model_copy(update={"sensitivity": same.sensitivity - 1.1 * same.sensitivity_noise})
    assert lesion_differences(inside, ParityLimits(), False) == []
    assert "sensitivity" in lesion_differences(beyond, ParityLimits(), False)[0]
