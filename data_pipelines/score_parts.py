"""Scores on disk as they come, so that a killed scoring run goes on instead of starting again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipelines.image_check import save_arrays

# A kill costs at most this many scores, and what was still being scored.
PART_ROWS = 2048


class ScoreParts:
    """The image scores of one run. What `folder` holds when this is made counts as done; no row is kept twice.

    Attributes:
        log_probabilities: float64 (num_rows, num_classes), NaN where not done or not decodable.
        done: bool (num_rows,).
        errors: row -> reason.
        abstained: row -> (reason codes, detail), for pictures that were scored and should not be trusted.

    Args:
        folder: belongs to one model and one table of rows, always in the same order.
        with_abstained: whether the model has an abstention rule. A part that does not say what it abstained from then
            counts as not done: it comes from a release that asked no rule.
    """

    def __init__(self, folder: Path, num_rows: int, num_classes: int, with_abstained: bool):
        self._folder = folder
        self.log_probabilities = np.full((num_rows, num_classes), np.nan)
        self.done = np.zeros(num_rows, bool)
        self.errors: dict[int, str] = {}
        self.abstained: dict[int, tuple[str, str]] = {}
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_errors: dict[int, str] = {}
        self._waiting_abstained: dict[int, tuple[str, str]] = {}
        paths = sorted(folder.glob("scores-*.npz"))
        self._next = 1 + max((int(path.stem.removeprefix("scores-")) for path in paths), default=-1)
        for path in paths:
            with np.load(path) as part:
                if with_abstained and "abstained" not in part:
                    continue
                self._take(part["row"], part["log_probabilities"])
                self.errors |= {int(row): reason for row, reason in json.loads(str(part["errors"])).items()}
                if "abstained" in part:
                    kept = json.loads(str(part["abstained"]))
                    self.abstained |= {int(row): (codes, detail) for row, (codes, detail) in kept.items()}

    def add(
        self,
        row: np.ndarray,
        log_probabilities: np.ndarray,
        errors: dict[int, str],
        abstained: dict[int, tuple[str, str]] | None = None,
    ) -> None:
        """Takes scores of rows that are not done; they are on disk after some thousand rows or `flush`."""
        assert not self.done[row].any(), "a row was scored twice"
        self._take(row, log_probabilities)
        self.errors |= errors
        self.abstained |= abstained or {}
        self._waiting.append((row, log_probabilities))
        self._waiting_errors |= errors
        self._waiting_abstained |= abstained or {}
        if sum(len(rows) for rows, _ in self._waiting) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one more part, whole or not at all."""
        if not self._waiting:
            return
        save_arrays(
            self._folder / f"scores-{self._next:06d}.npz",
            row=np.concatenate([row for row, _ in self._waiting]),
            log_probabilities=np.concatenate([scores for _, scores in self._waiting]),
            errors=json.dumps(self._waiting_errors),
            abstained=json.dumps(self._waiting_abstained),
        )
        self._next += 1
        self._waiting, self._waiting_errors, self._waiting_abstained = [], {}, {}

    def _take(self, row: np.ndarray, log_probabilities: np.ndarray) -> None:
        self.log_probabilities[row] = log_probabilities
        self.done[row] = True
