"""The scorer gives the network's log-probabilities and the log's projection, whatever the batch."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import numpy as np
import pytest

from modeling import openvino_engine
from modeling.bundle import load_bundle
from modeling.engine_interface import EngineOutput
from serve.image_scorer import ImageScorer, ImageScorerLogic, ImageScores, ScoreCall
from serve.settings import ScorerSettings
from tests.bundle_factory import lesion_rule, served_bundle
from tests.tiny_bundle import EMBEDDING_DIM, SIZE, expected_outputs


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("scorer") / "bundle")


def test_scores_are_log_probabilities_and_do_not_depend_on_the_batch(reference):
    images = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)
    scores = ImageScorerLogic(reference, max_batch_size=4).score(images)
    logits, embedding = expected_outputs(images)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert np.allclose(scores.log_probabilities, expected, atol=1e-5)
    assert np.allclose(np.exp(scores.log_probabilities).sum(1), 1, atol=1e-6)
    matrix, mean = load_bundle(reference.bundle_uri).projection()
    assert np.allclose(scores.projections, (embedding - mean) @ matrix, atol=1e-5)
    assert scores.log_probabilities.dtype == scores.projections.dtype == np.float32
    one = ImageScorerLogic(reference, max_batch_size=1).score(images[3:4])
    assert np.allclose(one.log_probabilities, scores[3:4].log_probabilities, atol=1e-6)
    assert one.digest == reference.sha256


def test_every_row_keeps_its_own_distance_and_a_bundle_without_a_rule_has_none(reference, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    assert ImageScorerLogic(reference, max_batch_size=2).score(images)[1:2].distances is None
    rule = lesion_rule()
    scores = ImageScorerLogic(served_bundle(tmp_path / "bundle", abstention=rule), max_batch_size=2).score(images)
    # Rounding counts in directions that the tiny network never uses, hence the tolerance.
    assert np.allclose(scores.distances, rule.distance(expected_outputs(images)[1]), atol=0.05)
    assert np.unique(scores.distances).size == 5
    for row in range(5):
        assert scores[row : row + 1].distances.tolist() == [scores.distances[row]]


def test_extreme_logits_stay_finite(reference, monkeypatch):
    logic = ImageScorerLogic(reference, max_batch_size=4)
    extreme = EngineOutput(np.array([[0.0, 1e4]], np.float32), np.zeros((1, EMBEDDING_DIM), np.float32))
    monkeypatch.setattr(logic.engine, "run", lambda images: extreme)
    scores = logic.score(np.zeros((1, SIZE, SIZE, 3), np.uint8))
    assert np.isfinite(scores.log_probabilities).all()


def test_a_host_without_the_chosen_engine_serves_the_model_and_says_so(reference, monkeypatch):
    monkeypatch.setattr(openvino_engine, "_process_core", openvino_engine._process_core.__wrapped__)
    monkeypatch.setitem(sys.modules, "openvino", None)
    choice = {"engine": "openvino", "options": {"threads": 1}}
    logic = ImageScorerLogic(reference.model_copy(update={"engine": choice}), max_batch_size=4)
    described = logic.describe()
    assert described["engine"] == "onnxruntime-cpu-1" and "OpenVINO is not installed" in described["engine_fallback"]
    assert ImageScorerLogic(reference, max_batch_size=4).describe()["engine_fallback"] is None


def test_a_bundle_that_was_changed_is_refused(reference, tmp_path):
    other = served_bundle(tmp_path / "bundle", onnx_bias=1.0)
    with pytest.raises(ValueError, match="refused"):
        ImageScorerLogic(reference.model_copy(update={"bundle_uri": other.bundle_uri}), max_batch_size=4)
    with pytest.raises(ValueError, match="unknown engine"):
        ImageScorerLogic(reference.model_copy(update={"engine": {"engine": "abacus"}}), max_batch_size=4)


def test_as_many_batches_run_side_by_side_as_the_settings_say(reference):
    together, most = 0, 0
    lock, both = threading.Lock(), threading.Barrier(2)

    class Engine:
        digest = "d"

        def fits(self, images):
            return True

        def score(self, images):
            nonlocal together, most
            with lock:
                together += 1
                most = max(most, together)
            # Breaks, and fails the call, unless a second batch comes to run beside this one.
            both.wait(10)
            with lock:
                together -= 1
            return ImageScores("d", np.zeros((len(images), 2), np.float32), np.zeros((len(images), 64), np.float32))

    async def scenario():
        scorer = ImageScorer(ScorerSettings(max_concurrent_batches=2, max_batch_size=4).model_dump())
        scorer._slot._held = (reference, Engine())
        call = ScoreCall(np.zeros((4, 8, 8, 3), np.uint8), time.monotonic() + 30)
        for (scores,) in await asyncio.gather(*(scorer._score_together([call]) for _ in range(6))):
            assert scores.log_probabilities.shape == (4, 2)

    asyncio.run(scenario())
    assert most == 2


def test_pictures_whose_callers_gave_up_while_they_waited_are_not_looked_at(reference):
    scored, go_on = [], threading.Event()

    class Engine:
        digest = "d"

        def fits(self, images):
            return True

        def score(self, images):
            scored.append(len(images))
            assert go_on.wait(10)
            return ImageScores("d", np.zeros((len(images), 2), np.float32), np.zeros((len(images), 64), np.float32))

    async def scenario():
        scorer = ImageScorer(ScorerSettings(max_concurrent_batches=1).model_dump())
        scorer._slot._held = (reference, Engine())
        image = np.zeros((1, 8, 8, 3), np.uint8)
        deadline = time.monotonic() + 0.1
        first = asyncio.create_task(scorer._score_together([ScoreCall(image, deadline + 30)]))
        second = asyncio.create_task(
            scorer._score_together([ScoreCall(image, deadline), ScoreCall(image.repeat(2, axis=0), deadline + 30)])
        )
        while time.monotonic() <= deadline:
            await asyncio.sleep(0.01)
        go_on.set()
        assert (await first)[0] is not None
        gone, waiting = await second
        assert gone is None and len(waiting.log_probabilities) == 2

    asyncio.run(scenario())
    assert scored == [1, 2]
