"""Scores a metadata table with its pictures: pass 1 streams image scores, pass 2 fuses them per patient. A bundle
without an image model needs pass 2 only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_pipelines.batch_scoring import ScoredImages, ScoringOptions, stream_scores
from data_pipelines.hdf5_datasource import ImageRows
from data_pipelines.image_check import kept_index
from data_pipelines.image_reader import JoinedFiles
from data_pipelines.metadata_table import QuarantinedRow, read_metadata
from data_pipelines.progress import Progress
from data_pipelines.score_parts import ScoreParts
from modeling.abstention import AbstentionRule
from modeling.bundle import Bundle
from modeling.metrics import risk
from modeling.schema import TaskSpec

FUSED_ROWS = 20_000


class AbstainedRow(NamedTuple):
    """A row whose score should not be trusted: codes of `modeling.abstention`, separated by spaces, and figures."""

    id: str
    reasons: str
    detail: str


@dataclass
class ScoredTable:
    """`table` has isic_id, target (= risk) and, for more than two classes, a probability column per class.

    Rows of `abstained` are in it as well: a file of scores needs a number in every row.
    """

    table: pd.DataFrame
    quarantine: list[QuarantinedRow]
    abstained: list[AbstainedRow]
    context: str
    images_without_metadata: int


def metadata_arrays(table: pd.DataFrame, task: TaskSpec) -> dict[str, np.ndarray]:
    """The task's metadata columns as arrays: float64 with NaN, or objects with None for missing."""
    columns = {}
    for name, spec in task.columns.items():
        if spec.kind == "numeric":
            columns[name] = table[name].to_numpy(np.float64, na_value=np.nan)
        else:
            columns[name] = table[name].astype(object).where(table[name].notna(), None).to_numpy()
    return columns


def check_context(bundle: Bundle, wanted: str) -> None:
    """Refuses a context that the bundle lacks, before any file of the table is read.

    Raises:
        ValueError: the bundle lacks it.
    """
    if wanted not in ("auto", *bundle.manifest.contexts):
        raise ValueError(f"context = {wanted!r}: the model has {sorted(bundle.manifest.contexts)}")


def choose_context(bundle: Bundle, table: pd.DataFrame, wanted: str) -> str:
    """The richest context that the bundle and the table allow, or the one asked for.

    Raises:
        ValueError: the bundle lacks it, or it needs a context group that rows of the table do not have.
    """
    check_context(bundle, wanted)
    named = bool((table["context"] != "").all())
    if wanted == "auto":
        if "patient" in bundle.contexts and named:
            return "patient"
        return "none" if "none" in bundle.contexts else "image_only"
    if wanted == "patient" and not named:
        raise ValueError(f"context = 'patient': {bundle.task.context_group} is empty in some rows")
    return wanted


def score_table(
    bundle: Bundle,
    images: str | None,
    metadata: str,
    context: str,
    num_scorers: int,
    parts: Path,
    say: Callable[[str], None],
) -> ScoredTable:
    """Scores every usable row of a CSV.

    Args:
        images: HDF5 file or URL; None only for a bundle of metadata alone.
        context: "auto" or one of the bundle's contexts.
        parts: folder that keeps finished scores; a run that was killed goes on from them.

    Raises:
        ValueError: unreadable files, missing columns, or no row that can be scored.
    """
    task = bundle.task
    table, quarantine = read_metadata(metadata, task, require_labels=False)
    if context != "auto":
        # A wrong wish costs no scoring. "auto" is settled by the rows that can be scored.
        choose_context(bundle, table, context)
    log_probabilities, without_metadata = None, 0
    abstained: list[AbstainedRow] = []
    if "image" in bundle.manifest.modalities:
        assert images is not None
        table, log_probabilities, without_metadata = _with_image_scores(
            bundle, images, metadata, table, quarantine, abstained, num_scorers, parts, say
        )
    elif table.empty:
        raise ValueError(f"no row of {metadata} can be scored: {quarantine[-1].reason}, {quarantine[-1].detail}")

    used = choose_context(bundle, table, context)
    trusted = ~table["id"].isin({row.id for row in abstained}).to_numpy()
    probabilities = fuse(bundle, used, log_probabilities, table, trusted)
    result = pd.DataFrame({"isic_id": table["id"], "target": risk(probabilities, task)})
    if task.num_classes > 2:
        for number, name in enumerate(task.classes):
            result[name] = probabilities[:, number]
    return ScoredTable(result, quarantine, abstained, used, without_metadata)


def _with_image_scores(
    bundle: Bundle,
    images: str,
    metadata: str,
    table: pd.DataFrame,
    quarantine: list[QuarantinedRow],
    abstained: list[AbstainedRow],
    num_scorers: int,
    parts: Path,
    say: Callable[[str], None],
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Pass 1: the rows with a picture, their log-probabilities float64 (N, K), and the number of pictures without a
    row. Adds the others to `quarantine`, and pictures the model should not score to `abstained`."""
    task = bundle.task
    with Progress("index", say) as progress:
        index = kept_index(images, parts, progress)
    location = pd.Series(np.arange(len(index.ids)), index=index.ids)
    position = location.reindex(table["id"]).to_numpy()
    found = np.isfinite(position)
    quarantine += [QuarantinedRow(str(i), "image_missing", f"not in {Path(images).name}") for i in table["id"][~found]]
    table, position = table[found].reset_index(drop=True), position[found].astype(np.int64)
    if table.empty:
        raise ValueError(f"no row of {metadata} has a picture in {images}; expected ids in column {task.id_column!r}")

    unlabelled = np.full(len(position), -1, np.int64)
    rows = ImageRows(index.ids[position], index.offset[position], index.size[position], unlabelled)
    scores = image_scores(bundle, images, rows, num_scorers, parts, say)
    log_probabilities = scores.log_probabilities
    for row, reason in sorted(scores.errors.items()):
        quarantine.append(QuarantinedRow(str(table["id"].iloc[row]), "undecodable", reason))
    abstained += [AbstainedRow(str(table["id"].iloc[row]), *said) for row, said in sorted(scores.abstained.items())]
    good = np.isfinite(log_probabilities).all(axis=1)
    table, log_probabilities = table[good].reset_index(drop=True), log_probabilities[good]
    if table.empty:
        raise ValueError(f"no picture of {images} could be decoded: {quarantine[-1].detail}")
    return table, log_probabilities, int(len(index.ids) - len(set(rows.ids)))


def image_scores(
    bundle: Bundle,
    images: str | JoinedFiles,
    rows: ImageRows,
    num_scorers: int,
    parts: Path,
    say: Callable[[str], None],
) -> ScoreParts:
    """The image scores of all rows, of which only those are made here that no earlier attempt has kept."""
    rule = bundle.abstention()
    kept = ScoreParts(parts, len(rows), bundle.task.num_classes, with_abstained=rule is not None)
    missing = np.flatnonzero(~kept.done)
    if len(missing) < len(rows):
        say(f"{len(rows) - len(missing)} of {len(rows)} images were scored by an earlier attempt")
    with Progress("scored images", say) as progress:
        progress(len(rows) - len(missing), len(rows))
        options = ScoringOptions(
            distance=None if rule is None else rule.distance, with_quality=rule is not None, num_scorers=num_scorers
        )
        size = bundle.manifest.input_size
        for scored in stream_scores(images, rows.take(missing), str(bundle.onnx_path), size, options):
            errors = {int(missing[scored.row[at]]): reason for at, reason in scored.errors.items()}
            abstained = {} if rule is None else abstentions(rule, scored, missing[scored.row])
            kept.add(missing[scored.row], scored.log_probabilities, errors, abstained)
            progress(int(kept.done.sum()), len(rows))
    kept.flush()
    return kept


def abstentions(rule: AbstentionRule, scored: ScoredImages, names: np.ndarray) -> dict[int, tuple[str, str]]:
    """Reason codes and detail of the decoded pictures that a model should not score, by their name in int64 (N,)."""
    assert scored.distance is not None
    found = {}
    for position, refusals in enumerate(rule.refusals(scored.quality, scored.distance)):
        if refusals and position not in scored.errors:
            codes, details = zip(*refusals, strict=True)
            found[int(names[position])] = (" ".join(codes), "; ".join(details))
    return found


def fuse(
    bundle: Bundle, context: str, log_probabilities: np.ndarray | None, table: pd.DataFrame, trusted: np.ndarray
) -> np.ndarray:
    """Pass 2: probabilities float64 (N, K), some thousand rows at a time: the features of a row take a hundred times
    the memory of the row. A patient's rows stay together."""
    model = bundle.contexts[context]
    groups = table["context"].to_numpy(str) if context == "patient" else None

    def predict(rows: np.ndarray, compared: np.ndarray | None = None) -> np.ndarray:
        columns = None if context == "image_only" else metadata_arrays(table.iloc[rows], bundle.task)
        image = None if log_probabilities is None else log_probabilities[rows]
        return model.predict(image, columns, None if groups is None else groups[rows], compared)

    order = np.arange(len(table)) if groups is None else np.argsort(groups, kind="stable")
    probabilities = np.empty((len(table), bundle.task.num_classes))
    for part in _whole_groups(order, groups):
        probabilities[part] = predict(part)
        if groups is None or trusted[part].all():
            continue
        # The score of a picture that shows no lesion says nothing about the patient's others. Its own row keeps the
        # number from above: trees that never saw a gap in these features would read one as the lowest rank.
        mixed = part[np.isin(groups[part], groups[part[~trusted[part]]])]
        keep = trusted[mixed]
        probabilities[mixed[keep]] = predict(mixed, keep)[keep]
    return probabilities


def _whole_groups(order: np.ndarray, groups: np.ndarray | None) -> Iterator[np.ndarray]:
    """Consecutive pieces of `order` of about FUSED_ROWS rows that cut no group in two."""
    start = 0
    while start < len(order):
        end = min(start + FUSED_ROWS, len(order))
        while groups is not None and end < len(order) and groups[order[end]] == groups[order[end - 1]]:
            end += 1
        yield order[start:end]
        start = end
