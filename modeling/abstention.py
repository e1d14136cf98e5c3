"""When a model does not score: pictures that are not usable, or like nothing it was trained on.

Image limits and the embedding's distance share one budget of false refusals among pictures like those of training.
A refusal is for a person to look at; it is never a low risk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modeling.embedding_distance import EmbeddingDistance
from modeling.image_limits import FIGURES, Limit, Refusal, figures, fit_limits, outside, refusals

UNLIKE_TRAINING = "unlike_training"
REASONS = (*dict.fromkeys(reason for figure in FIGURES.values() for reason in figure[1:]), UNLIKE_TRAINING)
FALSE_REFUSAL_RATE = 0.01
# With fewer, a limit that one picture in a hundred passes would be a guess.
MIN_ROWS = 100
# Image limits catch what they are made for far inside this part of the budget; the distance uses the rest.
_SHARE_OF_LIMITS = 0.5
_RULE, _ARRAYS = "abstention.json", "abstention.npz"


class _File(BaseModel):
    """`abstention.json`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: int = Field(ge=1, le=1)
    false_refusal_rate: float = Field(gt=0, lt=1)
    num_rows: int = Field(ge=MIN_ROWS)
    limits: dict[str, Limit]
    max_distance: float = Field(ge=1)
    measured: dict[str, Any]

    @model_validator(mode="after")
    def _known_figures(self) -> _File:
        if set(self.limits) != set(FIGURES):
            raise ValueError(f"limits are of {sorted(self.limits)}; expected {sorted(FIGURES)}")
        return self


@dataclass(frozen=True)
class AbstentionRule:
    """Decides whether a picture is scored.

    Attributes:
        limits: by figure of `modeling.image_limits`.
        distance: from the training embeddings.
        max_distance: the largest distance at which a picture is scored.
        false_refusal_rate: share of pictures like those of training that it was fitted to refuse.
        num_rows: pictures it was fitted on.
        measured: what it refused of the gate split and of unusable pictures, JSON-ready; may be empty.
    """

    limits: dict[str, Limit]
    distance: EmbeddingDistance
    max_distance: float
    false_refusal_rate: float
    num_rows: int
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        quality: Mapping[str, np.ndarray],
        embeddings: np.ndarray,
        groups: Sequence,
        seed: int,
        false_refusal_rate: float = FALSE_REFUSAL_RATE,
    ) -> AbstentionRule | None:
        """Fits limits and distance on training pictures; None with fewer than 100 that have all figures or two groups.

        Each half of the groups counts as new to what the other half fits: that is where limits are set.

        Args:
            quality: figures of `image_quality`, float (N,) each.
            embeddings: of the network that is served, float (N, D).
            groups: patient or lesion of each row (N,): pictures of one are more alike than new ones will be.
            seed: of the halves.
        """
        values = figures(quality)
        whole = np.isfinite(embeddings).all(axis=1) & np.isfinite(np.stack(list(values.values()))).all(axis=0)
        embeddings, values = embeddings[whole], {name: column[whole] for name, column in values.items()}
        number = len(embeddings)
        names, codes = np.unique(np.asarray(groups)[whole], return_inverse=True)
        if number < MIN_ROWS or len(names) < 2:
            return None
        first = (np.random.default_rng(seed).permutation(len(names)) < len(names) // 2)[codes]
        limits, refused = fit_limits(values, _SHARE_OF_LIMITS * false_refusal_rate, first)
        distances = np.empty(number, np.float32)
        for half in (first, ~first):
            distances[half] = EmbeddingDistance.fit(embeddings[~half])(embeddings[half])
        # The share that one more picture like these passes with, hence number + 1 (split conformal prediction).
        left = max(0, int(false_refusal_rate * (number + 1)) - int(refused.sum()))
        farthest = np.sort(distances[~refused])[::-1]
        return cls(
            limits=limits,
            distance=EmbeddingDistance.fit(embeddings),
            # Ordinary pictures are about 1 away; where all training pictures look alike, so may new ones a little less.
            max_distance=max(1.0, float(farthest[min(left, len(farthest) - 1)])),
            false_refusal_rate=false_refusal_rate,
            num_rows=number,
        )

    def refusals(self, quality: Mapping[str, Any], distances: np.ndarray) -> list[list[Refusal]]:
        """Per picture why it is not scored; empty where it is. A figure that is no number is a reason.

        Args:
            quality: figures of `image_quality`, floats or float (N,).
            distances: `distance` of the embeddings, float (N,).
        """
        values, distances = figures(quality), np.atleast_1d(distances)
        found: list[list[Refusal]] = [[] for _ in distances]
        for row in np.flatnonzero(outside(self.limits, values)):
            found[row] += refusals(self.limits, values, int(row))
        for row in np.flatnonzero(~(distances <= self.max_distance)):
            detail = f"embedding distance {distances[row]:.3g}, expected at most {self.max_distance:.3g}"
            found[row].append(Refusal(UNLIKE_TRAINING, detail))
        return found

    def describe(self) -> dict[str, Any]:
        """Limits and measurements, JSON-ready."""
        return {
            "false_refusal_rate": self.false_refusal_rate,
            "num_rows": self.num_rows,
            "limits": {name: limit.model_dump() for name, limit in self.limits.items()},
            "max_distance": self.max_distance,
            "measured": self.measured,
        }

    def save(self, directory: Path) -> None:
        """Writes `abstention.json` and `abstention.npz`."""
        content = _File.model_validate({"schema_version": 1, **self.describe()})
        (directory / _RULE).write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")
        np.savez_compressed(directory / _ARRAYS, **self.distance.arrays())

    @classmethod
    def load(cls, directory: Path) -> AbstentionRule | None:
        """What `save` wrote; None where there is nothing.

        Raises:
            ValueError: files that do not fit, or only one of them.
        """
        path = directory / _RULE
        if not path.exists() and not (directory / _ARRAYS).exists():
            return None
        try:
            content = _File.model_validate(json.loads(path.read_text(encoding="utf-8")))
            with np.load(directory / _ARRAYS, allow_pickle=False) as arrays:
                distance = EmbeddingDistance.from_arrays(**{name: arrays[name] for name in arrays.files})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or _RULE
            raise ValueError(f"abstention rule {path} is not valid: {place}: {first['msg']}") from error
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"abstention rule {path} cannot be read: {error}") from error
        return cls(
            content.limits,
            distance,
            content.max_distance,
            content.false_refusal_rate,
            content.num_rows,
            content.measured,
        )
