"""Which rows an epoch trains on: class-balanced, with fresh negatives, a pure function of (seed, epoch)."""

from __future__ import annotations

import fsspec
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.schema import TaskSpec


class SamplingConfig(BaseModel):
    """How an epoch is drawn.

    Attributes:
        class_balance: 0 keeps the data's class shares, 1 makes all classes equal; a class of n rows gets a share
            proportional to n ** (1 - class_balance), within the malignant and the benign classes.
        negatives_per_positive: benign rows for each malignant row; None leaves the ratio to class_balance.
        epoch_rows: rows an epoch; None: as many as there are training rows.
    """

    model_config = ConfigDict(extra="forbid")

    class_balance: float = Field(0.5, ge=0.0, le=1.0)
    negatives_per_positive: float | None = Field(None, gt=0.0, le=1000.0)
    epoch_rows: int | None = Field(None, ge=8)


def class_shares(counts: np.ndarray, task: TaskSpec, config: SamplingConfig) -> np.ndarray:
    """float64 (K,) shares of an epoch, adding up to 1; a class without rows gets 0."""
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(float) ** (1.0 - config.class_balance), 0.0)
    if config.negatives_per_positive is not None:
        malignant = task.malignant_mask
        positive, negative = weights[malignant].sum(), weights[~malignant].sum()
        if positive > 0 and negative > 0:
            weights[malignant] /= positive
            weights[~malignant] *= config.negatives_per_positive / negative
    return weights / weights.sum()


def draw_epoch(labels: np.ndarray, shares: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (num_rows,) positions into `labels`, shuffled.

    A class with fewer rows than its share (the positives) gives every row equally often, and the rest once more. A
    class with more (the negatives) gives rows that no earlier epoch saw, until too few are left for another epoch; then
    they are shuffled anew.
    """
    wanted = np.floor(shares * num_rows).astype(int)
    remainder = np.argsort(-(shares * num_rows - wanted), kind="stable")[: num_rows - wanted.sum()]
    wanted[remainder] += 1
    drawn = []
    for label, count in enumerate(wanted):
        members = np.flatnonzero(labels == label)
        if count == 0 or len(members) == 0:
            continue
        full, rest = divmod(int(count), len(members))
        drawn.append(np.tile(members, full))
        drawn.append(members[_unseen(len(members), rest, [seed, label], epoch)])
    index = np.concatenate(drawn).astype(np.int64)
    return index[np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(len(index))]


def _unseen(total: int, count: int, seed: list[int], epoch: int) -> np.ndarray:
    """int64 (count,) of range(total): slices of one shuffle, taken in turn, then of the next shuffle."""
    if count == 0:
        return np.empty(0, np.int64)
    shuffle, part = divmod(epoch, total // count)
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(shuffle,)))
    return generator.permutation(total)[part * count : (part + 1) * count]


class EpochCursor:
    """Tells the data source which epoch to draw next, through a small file beside the run's checkpoints.

    Ray Data counts executions from 0 again when train workers restart, so a resumed run would replay epoch 0. Rank 0
    announces the epoch before any worker asks for its first batch; the source reads it when the execution starts.
    """

    def __init__(self, url: str):
        self._url = url

    def announce(self, epoch: int) -> None:
        with fsspec.open(self._url, "w", auto_mkdir=True) as file:
            file.write(str(epoch))

    def read(self) -> int:
        try:
            with fsspec.open(self._url, "r") as file:
                return int(file.read())
        except FileNotFoundError:
            return 0


class EpochOrder:
    """The data source's `order`: the announced epoch's rows."""

    def __init__(self, labels: np.ndarray, shares: np.ndarray, num_rows: int, seed: int, cursor: EpochCursor):
        self._labels, self._shares, self._num_rows, self._seed, self._cursor = labels, shares, num_rows, seed, cursor

    def __call__(self) -> tuple[int, np.ndarray]:
        epoch = self._cursor.read()
        return epoch, draw_epoch(self._labels, self._shares, self._num_rows, self._seed, epoch)
