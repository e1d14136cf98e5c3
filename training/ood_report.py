"""What an abstention rule does: how many usable pictures it refuses, and how many of each kind of unusable ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch_scoring import ScoredImages
from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.image_reader import ImageReader
from modeling.abstention import AbstentionRule
from modeling.image_limits import Refusal
from modeling.preprocessing import decode_image, image_quality, resize
from modeling.tested_risks import wilson_interval
from training.figures import headless_pyplot
from training.ood_pictures import CORRUPTIONS, NON_LESIONS, Kind

Embed = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 (N, S, S, 3) -> embeddings float32 (N, D), by the network that is served."""

_EXAMPLE_SIDE, _COLUMNS = 128, 8


@dataclass
class OodReport:
    """What was measured.

    Attributes:
        measured: JSON-ready: {"gate": counts of false refusals, "kinds": rows of kind, set, strength, held_out, n,
            refused, share, reasons}.
        examples: kind -> uint8 RGB (128, 128, 3), one picture each. Of spoilt lesions: for a report that stays in
            house, not for the bundle.
    """

    measured: dict[str, Any]
    examples: dict[str, np.ndarray] = field(default_factory=dict)


def false_refusals(
    rule: AbstentionRule, scored: ScoredImages, malignant: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    """Refused pictures of lesions that trained nothing: of all, of the malignant and of the benign ones.

    Args:
        scored: with quality and distance.
        malignant: bool (N,).
        groups: (N,) patients (or lesions), each of which counts once in the intervals: one person's skin or camera
            gets all their pictures refused.
    """
    assert scored.distance is not None
    found = rule.refusals(scored.quality, scored.distance)
    refused = np.array([bool(refusals) for refusals in found], dtype=bool)
    kinds = {"all": np.ones(len(refused), bool), "malignant": malignant, "benign": ~malignant}
    counts = {name: _count(refused[rows], len(np.unique(groups[rows]))) for name, rows in kinds.items()}
    return counts | {"reasons": _reasons(found)}


def measure_kinds(
    rule: AbstentionRule, embed: Embed, input_size: int, lesions: Sequence[np.ndarray], number: int, seed: int
) -> OodReport:
    """Refused pictures of every kind of `training.ood_pictures`.

    Args:
        lesions: usable pictures, uint8 RGB (H, W, 3), to spoil.
        number: pictures of each kind that is no lesion.
    """
    report = OodReport({"kinds": []})

    def measure(group: str, kind: Kind, pictures: Sequence[np.ndarray]) -> None:
        figures = [image_quality(picture) for picture in pictures]
        quality = {name: np.array([row[name] for row in figures]) for name in figures[0]}
        distance = rule.distance(embed(np.stack([resize(picture, input_size) for picture in pictures])))
        found = rule.refusals(quality, distance)
        counts = _count(np.array([bool(refusals) for refusals in found]), len(found))
        facts = {"kind": kind.name, "set": group, "strength": kind.strength, "held_out": kind.held_out}
        report.measured["kinds"].append(facts | counts | {"reasons": _reasons(found)})
        report.examples[kind.name] = resize(pictures[0], _EXAMPLE_SIDE)

    for position, kind in enumerate(NON_LESIONS):
        generator = np.random.default_rng([seed, position])
        measure("non_lesion", kind, [kind.make(generator) for _ in range(number)])
    for position, kind in enumerate(CORRUPTIONS):
        generator = np.random.default_rng([seed, len(NON_LESIONS) + position])
        if lesions:
            measure("corrupted_lesion", kind, [kind.make(lesion, generator) for lesion in lesions])
    return report


def some_pictures(version: DatasetVersion, positions: np.ndarray, number: int, seed: int) -> list[np.ndarray]:
    """Decoded pictures of at most `number` of these rows, drawn at random, uint8 RGB (H, W, 3)."""
    assert version.images_path is not None
    chosen = np.random.default_rng(seed).choice(positions, min(number, len(positions)), replace=False)
    rows = version.rows(np.sort(chosen))
    with ImageReader(version.images_path) as reader:
        encoded = reader.read_many(rows.ids, rows.offset, rows.size)
    return [decode_image(data) for data in encoded if not isinstance(data, Exception)]


def _count(refused: np.ndarray, independent: int) -> dict[str, Any]:
    number, hits = len(refused), int(refused.sum())
    share = hits / number if number else None
    low, high = (None, None) if share is None else wilson_interval(share, independent)
    return {"n": number, "refused": hits, "share": share, "low": low, "high": high}


def _reasons(found: Sequence[Sequence[Refusal]]) -> dict[str, int]:
    return dict(Counter(refusal.reason for refusals in found for refusal in refusals).most_common())


def plot_abstention(path: Path, report: OodReport, title: str) -> None:
    """A contact sheet: a picture of every kind, with the share refused; held-out kinds in italics."""
    pyplot = headless_pyplot()
    rows = report.measured["kinds"]
    height = -(-len(rows) // _COLUMNS)
    figure, axes = pyplot.subplots(
        height, _COLUMNS, figsize=(1.75 * _COLUMNS, 2.25 * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.imshow(report.examples[row["kind"]])
        colour = "#2b7a3d" if row["share"] >= 0.9 else "#b36b00" if row["share"] >= 0.5 else "#b5473c"
        style = "italic" if row["held_out"] else "normal"
        text = f"{row['kind'].replace('_', ' ')}\n{row['share']:.0%} of {row['n']} refused"
        axis.set_title(text, fontsize=9, color=colour, style=style)
    gate = report.measured["gate"]["all"]
    usable = (
        f"refused of {gate['n']} usable gate pictures: {gate['share']:.2%} ({gate['low']:.2%} to {gate['high']:.2%})"
    )
    figure.suptitle(f"{title}: what the model refuses to score; {usable}\nitalics: kinds the rule was not designed on")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
