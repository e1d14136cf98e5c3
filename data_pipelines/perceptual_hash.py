"""Finds pictures that show the same thing: a 63-bit hash of low frequencies, and pairs of hashes that hardly differ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

THUMBNAIL = 32
FREQUENCIES = 8
BANDS, BAND_BITS = 4, 16
MAX_COMPARISONS = 200_000_000


def thumbnail(image: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """Grey float32 (side, side) of a uint8 RGB picture."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The first 8 rows of the orthonormal DCT-II of 32 points, float32 (8, 32)."""
    steps = (2 * np.arange(THUMBNAIL) + 1) * np.pi / (2 * THUMBNAIL)
    matrix = np.cos(np.arange(FREQUENCIES)[:, None] * steps) * np.sqrt(2 / THUMBNAIL)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def perceptual_hash(thumbnails: np.ndarray) -> np.ndarray:
    """uint64 (N,): which of the 63 lowest spatial frequencies of each thumbnail lie above their median ("pHash").

    Recompression, resizing and small changes of brightness turn few bits; the mean is left out.

    Args:
        thumbnails: float32 (N, 32, 32).
    """
    cosines = _cosines()
    frequencies = (cosines @ thumbnails @ cosines.T).reshape(len(thumbnails), -1)[:, 1:]
    bits = frequencies > np.median(frequencies, axis=1, keepdims=True)
    padded = np.concatenate([np.zeros((len(bits), 1), bool), bits], axis=1)
    return np.packbits(padded, axis=1).view(">u8")[:, 0].astype(np.uint64)


@dataclass(frozen=True)
class NearPairs:
    """Pairs of positions int64 (M, 2), nearest first; `complete` is False when the search was cut off."""

    pairs: np.ndarray
    complete: bool


def near_pairs(hashes: np.ndarray, parts: np.ndarray, max_distance: int = 3) -> NearPairs:
    """Pairs of different parts whose hashes differ in at most `max_distance` bits.

    Two hashes that differ in 3 bits agree in at least one of four 16-bit bands, so only those of one bucket are
    compared: every pair up to distance 3 is found.

    Args:
        hashes: uint64 (N,).
        parts: int64 (N,), e.g. folds; pairs within a part are not of interest.
    """
    assert max_distance < BANDS
    found = [np.empty((0, 2), np.int64)]
    comparisons, complete = 0, True
    for band in range(BANDS):
        key = (hashes >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)
        order = np.argsort(key, kind="stable")
        sorted_key = key[order]
        left = np.arange(len(order))
        for distance in range(1, len(order)):
            left = left[left + distance < len(order)]
            left = left[sorted_key[left] == sorted_key[left + distance]]
            if not len(left):
                break
            comparisons += len(left)
            if comparisons > MAX_COMPARISONS:
                complete = False
                break
            first, second = order[left], order[left + distance]
            near = np.bitwise_count(hashes[first] ^ hashes[second]) <= max_distance
            apart = near & (parts[first] != parts[second])
            found.append(np.sort(np.stack([first[apart], second[apart]], axis=1), axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    nearest = np.argsort(np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]), kind="stable")
    return NearPairs(pairs[nearest], complete)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two grey thumbnails' pixels, -1 to 1; 0 when one of them is flat."""
    first, second = first.ravel() - first.mean(), second.ravel() - second.mean()
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norm if norm > 0 else 0.0
