"""The distance is about 1 for pictures like those of training, grows off their subspace, and ignores length."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.embedding_distance import EmbeddingDistance

DIM = 96


def embeddings(number, seed=0, rank=10):
    """Points in a thin slab: `rank` directions vary, the others hardly."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(rank, DIM))
    return 8.0 + rng.normal(size=(number, rank)) @ basis + 0.1 * rng.normal(size=(number, DIM))


def test_new_pictures_like_those_of_training_are_about_one_away():
    distance = EmbeddingDistance.fit(embeddings(2000))
    new = distance(embeddings(2000, seed=1))
    assert new.dtype == np.float32 and new.shape == (2000,)
    assert new.mean() == pytest.approx(1.0, rel=0.1)


def test_what_leaves_the_subspace_is_far_though_its_length_is_ordinary():
    distance = EmbeddingDistance.fit(embeddings(2000))
    usual = embeddings(200, seed=1)
    off = usual + 2.0 * np.random.default_rng(5).normal(size=(200, DIM))
    assert distance(off).min() > 5 * distance(usual).max()


def test_length_says_nothing_and_no_length_at_all_is_far():
    distance = EmbeddingDistance.fit(embeddings(2000))
    usual = embeddings(50, seed=1)
    np.testing.assert_allclose(distance(usual), distance(0.01 * usual), rtol=1e-2)
    assert distance(np.zeros((1, DIM)))[0] > 5 * distance(usual).max()


@pytest.mark.parametrize("number", [2, 7, 40, 100])
def test_fewer_rows_than_dimensions_give_finite_distances(number):
    distance = EmbeddingDistance.fit(embeddings(number))
    assert distance.axes.shape[1] <= number // 8
    found = distance(np.vstack([embeddings(20, seed=1), np.zeros((1, DIM))]))
    assert np.isfinite(found).all() and (found >= 0).all()


def test_a_network_that_answers_everything_alike_still_has_a_distance():
    constant = np.full((300, DIM), 3.0, np.float32)
    distance = EmbeddingDistance.fit(constant)
    same, other = distance(np.vstack([constant[:1], embeddings(1)]))
    assert np.isfinite([same, other]).all() and same < 1e-3 < 1 < other


def test_it_survives_its_arrays_and_refuses_others():
    distance = EmbeddingDistance.fit(embeddings(500))
    again = EmbeddingDistance.from_arrays(**distance.arrays())
    points = embeddings(50, seed=2)
    np.testing.assert_array_equal(distance(points), again(points))
    with pytest.raises(ValueError, match=r"have shapes .* expected \(D,\)"):
        EmbeddingDistance.from_arrays(**(distance.arrays() | {"variance": np.ones(3)}))


def test_a_picture_without_numbers_has_no_distance():
    found = EmbeddingDistance.fit(embeddings(500))(np.full((1, DIM), np.nan))
    assert np.isnan(found).all()
