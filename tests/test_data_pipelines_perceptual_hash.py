"""The same picture is found again after recompression and resizing, other pictures are not, and no pair is missed."""

import cv2
import numpy as np
import pytest

from data_pipelines import perceptual_hash as module
from data_pipelines.perceptual_hash import near_pairs, perceptual_hash, similarity, thumbnail
from data_pipelines.synthetic_lesions import LesionAppearance, render_lesion


def tile(seed, size=120):
    rng = np.random.default_rng(seed)
    looks = LesionAppearance(diameter_mm=rng.uniform(3, 9), irregularity=rng.uniform(), variegation=rng.uniform())
    return render_lesion(looks, rng, size)


def hash_of(*images):
    return perceptual_hash(np.stack([thumbnail(image) for image in images]))


def distance(first, second):
    return int(np.bitwise_count(first ^ second))


def changed_copies(image):
    jpeg = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    yield jpeg
    yield cv2.resize(image, (90, 90), interpolation=cv2.INTER_AREA)
    yield cv2.convertScaleAbs(image, alpha=0.9, beta=6)


def test_copies_are_near_and_other_lesions_are_far():
    near, far = [], []
    for seed in range(30):
        image = tile(seed)
        original, *copies = hash_of(image, *changed_copies(image))
        near += [distance(original, copy) for copy in copies]
        far.append(distance(original, hash_of(tile(1000 + seed))[0]))
    assert np.mean(np.array(near) <= 3) > 0.9
    assert np.mean(np.array(far) > 3) == 1.0


def test_similarity_tells_copies_from_other_lesions_and_survives_a_flat_picture():
    image = tile(1)
    for copy in changed_copies(image):
        assert similarity(thumbnail(image, 64), thumbnail(copy, 64)) > 0.98
    assert similarity(thumbnail(image, 64), thumbnail(tile(2), 64)) < 0.95
    assert similarity(thumbnail(image, 64), np.full((64, 64), 7.0, np.float32)) == 0.0


@pytest.fixture
def population():
    """2,000 hashes of low entropy, as lesions in the middle of skin have, with close pairs strewn in."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**24, 2000, dtype=np.uint64) * np.uint64(2**20)
    for row in range(0, 400, 2):
        for bit in rng.choice(64, rng.integers(0, 4), replace=False):
            hashes[row + 1] = (hashes[row] if bit else hashes[row]) ^ np.uint64(1 << int(bit))
    return hashes, rng.integers(-1, 4, 2000)


def test_every_pair_up_to_distance_3_across_parts_is_found_and_no_other(population):
    hashes, parts = population
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    wanted = (distances <= 3) & (parts[:, None] != parts[None, :]) & np.triu(np.ones_like(distances, bool), 1)
    found = near_pairs(hashes, parts)
    assert found.complete and set(map(tuple, found.pairs)) == set(zip(*np.nonzero(wanted), strict=True))
    order = [distance(hashes[i], hashes[j]) for i, j in found.pairs]
    assert order == sorted(order)


def test_a_search_that_is_cut_off_says_so(population, monkeypatch):
    monkeypatch.setattr(module, "MAX_COMPARISONS", 100)
    assert not near_pairs(*population).complete


def test_nothing_to_compare_is_no_pair():
    assert len(near_pairs(np.empty(0, np.uint64), np.empty(0, np.int64)).pairs) == 0
