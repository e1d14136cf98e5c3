"""What an engine actor adds to a batch: only what was asked for, and the same whatever else was."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from data_pipelines.batch_scoring import EngineScorer, ScoringOptions
from modeling.embedding_distance import EmbeddingDistance
from tests.tiny_bundle import EMBEDDING_DIM, SIZE, expected_outputs, write_onnx


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "image_scorer.onnx"
    write_onnx(path)
    return str(path)


def test_an_actor_adds_what_its_options_ask_for(onnx):
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    _, embedding = expected_outputs(images)
    distance = EmbeddingDistance.fit(np.random.default_rng(1).normal(size=(200, EMBEDDING_DIM)))
    projection = (np.eye(EMBEDDING_DIM, 64, dtype=np.float32), np.ones(EMBEDDING_DIM, np.float32))

    def scored(**options):
        # As Ray hands it to an actor.
        scorer = EngineScorer(onnx, pickle.loads(pickle.dumps(ScoringOptions(**options))))
        return scorer({"row": np.arange(5), "image": images})

    assert set(scored()) == {"row", "logits"}
    both = scored(with_embedding=True, projection=projection, distance=distance)
    assert set(both) == {"row", "logits", "embedding", "distance"}
    np.testing.assert_array_equal(both["logits"], scored()["logits"])
    # The distance is of the whole embedding, not of what the log keeps of it.
    np.testing.assert_allclose(both["distance"], distance(embedding), rtol=1e-4)
    np.testing.assert_allclose(both["embedding"][:, :EMBEDDING_DIM], embedding - 1, atol=1e-4)
    assert set(scored(distance=distance)) == {"row", "logits", "distance"}
