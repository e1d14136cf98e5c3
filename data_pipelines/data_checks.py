"""Data tests that users run on their own data: each looks at one property of a dataset version and gives a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.image_reader import ImageReader
from data_pipelines.perceptual_hash import near_pairs, similarity, thumbnail
from data_pipelines.stratified_folds import GATE_FOLD
from modeling.metrics import roc_auc
from modeling.preprocessing import decode_image
from modeling.schema import LEAK_COLUMNS

# Side of the thumbnails that decide whether two pictures with near hashes show the same.
COMPARED_SIDE = 64
MIN_ROWS_FOR_AUC = 20
# A numeric column of so few distinct values may be a code, whose order says nothing: 3 = melanoma, 4 = naevus.
MAX_CODES = 20
_IMAGE_REASONS = ("undecodable", "image_missing", "metadata_missing")


class CheckLimits(BaseModel):
    """When a check warns or fails."""

    model_config = ConfigDict(extra="forbid")

    max_bad_values: float = Field(0.01, ge=0.0, le=1.0, description="share of rows quarantined for a column's value")
    max_missing: float = Field(0.2, ge=0.0, le=1.0, description="share of a column's values")
    max_missing_gap: float = Field(0.2, ge=0.0, le=1.0, description="malignant minus benign share of missing values")
    max_single_auc: float = Field(0.98, ge=0.5, le=1.0, description="of one column alone; above it fails")
    warn_single_auc: float = Field(0.9, ge=0.5, le=1.0, description="of one column alone; above it warns")
    min_malignant: int = Field(10, ge=1, description="rows per split")
    min_similarity: float = Field(0.98, ge=0.0, le=1.0, description="correlation of 64 x 64 thumbnails")
    max_compared_pairs: int = Field(5000, ge=1, description="picture pairs that are decoded and compared")


class Verdict(NamedTuple):
    """One check's outcome and, in a sentence, what it saw."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    detail: str


def run_checks(
    version: DatasetVersion,
    header: list[str],
    limits: CheckLimits,
    on_progress: Callable[[int, int], None],
) -> list[Verdict]:
    """All checks, in the order a reader wants them.

    Args:
        header: all columns of the metadata file.
        on_progress: called with (picture pairs compared, pairs in total).
    """
    quarantine = pd.read_csv(version.path / "quarantine.csv", keep_default_na=False)
    return [
        _ranges(version, quarantine, limits),
        _images(version, quarantine, limits),
        *_missing(version, limits),
        _constant(version),
        *_leaks(version, header, limits),
        _label_balance(version, limits),
        _near_duplicates(version, limits, on_progress),
    ]


def _ranges(version: DatasetVersion, quarantine: pd.DataFrame, limits: CheckLimits) -> Verdict:
    reasons = ("not_a_number", "out_of_range", "category_unknown")
    bad = quarantine[quarantine["reason"].isin(reasons)]
    share = len(bad) / (len(version.lesions) + len(quarantine))
    if bad.empty:
        return Verdict("ranges", "ok", f"every value of {len(version.task.columns)} columns lies in its range")
    detail = f"{len(bad)} rows ({share:.2%}) quarantined for a value, e.g. {bad['id'].iloc[0]}: {bad['detail'].iloc[0]}"
    return Verdict("ranges", "fail" if share > limits.max_bad_values else "warn", detail)


def _images(version: DatasetVersion, quarantine: pd.DataFrame, limits: CheckLimits) -> Verdict:
    if version.images_path is None:
        return Verdict("images", "ok", "the data set has no pictures")
    count = {reason: int((quarantine["reason"] == reason).sum()) for reason in _IMAGE_REASONS}
    if not any(count.values()):
        return Verdict("images", "ok", f"all {len(version.lesions)} rows have a picture and every picture a row")
    # A file may hold the pictures of other tables as well: those without a row lose nothing.
    lost = count["undecodable"] + count["image_missing"]
    share = lost / (len(version.lesions) + lost)
    listed = ", ".join(f"{number} {reason}" for reason, number in count.items() if number)
    return Verdict("images", "fail" if share > limits.max_bad_values else "warn", f"{listed}; {share:.2%} of rows lost")


def _missing(version: DatasetVersion, limits: CheckLimits) -> list[Verdict]:
    lesions, malignant = version.lesions, _malignant(version)
    shares = {name: float(lesions[name].isna().mean()) for name in version.task.columns}
    many = {name: share for name, share in shares.items() if share > limits.max_missing}
    empty = [name for name, share in shares.items() if share == 1.0]
    if empty:
        first = Verdict("missing values", "fail", f"columns without a single value: {', '.join(empty)}")
    elif many:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in sorted(many.items(), key=lambda item: -item[1]))
        first = Verdict("missing values", "warn", f"more than {limits.max_missing:.0%} missing: {listed}")
    else:
        worst = max(shares, key=shares.get, default=None)
        detail = "the task has no metadata columns" if worst is None else f"at most {shares[worst]:.1%} ({worst})"
        first = Verdict("missing values", "ok", detail)
    telling = []
    for name in version.task.columns:
        gone = lesions[name].isna().to_numpy()
        if not malignant.any() or malignant.all():
            continue
        of_malignant, of_benign = float(gone[malignant].mean()), float(gone[~malignant].mean())
        # A value that no malignant lesion lacks, where ten should by chance, gives the label away as well.
        never = of_malignant == 0 and gone.mean() * malignant.sum() >= 10
        if abs(of_malignant - of_benign) > limits.max_missing_gap or never:
            telling.append(f"{name} ({of_malignant:.1%} of malignant, {of_benign:.1%} of benign)")
    if telling:
        detail = f"whether a value is missing tells the label: {', '.join(telling)}"
        return [first, Verdict("missing by label", "warn", detail)]
    return [first, Verdict("missing by label", "ok", "malignant and benign rows miss values alike")]


def constant_columns(lesions: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    """Columns whose known values are all the same; one without any value is missing, not constant."""
    return [name for name in columns if lesions[name].nunique(dropna=True) == 1]


def _constant(version: DatasetVersion) -> Verdict:
    constant = constant_columns(version.lesions, version.task.columns)
    if constant:
        return Verdict("constant columns", "warn", f"the same value in every row: {', '.join(constant)}")
    return Verdict("constant columns", "ok", "every column has at least two values")


def telling_columns(
    lesions: pd.DataFrame, columns: Iterable[str], malignant: np.ndarray, limit: float
) -> dict[str, float]:
    """Columns that alone tell malignant from benign with an AUC above the limit, and that AUC; the highest first.

    With fewer than 20 malignant or 20 benign rows nothing can be said, and no column is named.

    Args:
        malignant: bool (N,).
    """
    scores = {name: _single_column_auc(lesions[name], malignant) for name in columns}
    return {name: score for name, score in sorted(scores.items(), key=lambda item: -item[1]) if score > limit}


def _leaks(version: DatasetVersion, header: list[str], limits: CheckLimits) -> list[Verdict]:
    present = sorted(LEAK_COLUMNS & set(header))
    detail = f"present and kept out of the features: {', '.join(present)}" if present else "none in the file"
    known = Verdict("leak columns", "ok", detail)
    malignant = _malignant(version)
    counts = int(malignant.sum()), int((~malignant).sum())
    if min(counts) < MIN_ROWS_FOR_AUC:
        detail = f"not checked: {counts[0]} malignant and {counts[1]} benign rows; expected {MIN_ROWS_FOR_AUC} of each"
        return [known, Verdict("unknown leaks", "warn", detail)]
    lowest = min(limits.warn_single_auc, limits.max_single_auc)
    telling = telling_columns(version.lesions, version.task.columns, malignant, lowest)
    shown = ", ".join(f"{name} (AUC {score:.3f})" for name, score in telling.items())
    if any(score > limits.max_single_auc for score in telling.values()):
        return [known, Verdict("unknown leaks", "fail", f"one column alone gives the label: {shown}")]
    if telling:
        detail = f"one column alone nearly gives the label; is it known before the diagnosis? {shown}"
        return [known, Verdict("unknown leaks", "warn", detail)]
    return [known, Verdict("unknown leaks", "ok", f"no column alone reaches AUC {lowest}")]


def _single_column_auc(values: pd.Series, malignant: np.ndarray) -> float:
    """AUC of a numeric column in its better direction; of a categorical one, of each value's malignant share in the
    other half of the rows, so that rare values do not look telling by chance. A numeric one of few values is judged
    both ways. 0.5 where too few rows have a value."""
    if malignant.sum() < MIN_ROWS_FOR_AUC or (~malignant).sum() < MIN_ROWS_FOR_AUC:
        return 0.5
    if pd.api.types.is_numeric_dtype(values):
        number = values.to_numpy(float)
        known = np.isfinite(number)
        if malignant[known].sum() < MIN_ROWS_FOR_AUC or (~malignant[known]).sum() < MIN_ROWS_FOR_AUC:
            return 0.5
        score = float(roc_auc(malignant[known], number[known]))
        ordered = max(score, 1.0 - score)
        if len(np.unique(number[known])) > MAX_CODES:
            return ordered
        return max(ordered, _category_auc(values[known].astype(object), malignant[known]))
    return _category_auc(values, malignant)


def _category_auc(values: pd.Series, malignant: np.ndarray) -> float:
    codes, names = pd.factorize(values.fillna("(missing)"))
    half = np.random.default_rng(0).random(len(codes)) < 0.5
    scores = np.empty(len(codes))
    for part in (half, ~half):
        count = np.bincount(codes[part], minlength=len(names))
        positive = np.bincount(codes[part], weights=malignant[part], minlength=len(names))
        prior = malignant[part].mean()
        scores[~part] = ((positive + prior) / (count + 1.0))[codes[~part]]
    return float(roc_auc(malignant, scores))


def _label_balance(version: DatasetVersion, limits: CheckLimits) -> Verdict:
    malignant, folds = _malignant(version), version.lesions["fold"].to_numpy()
    parts = {"gate": GATE_FOLD} | {f"fold {fold}": fold for fold in version.training_folds}
    counts = {name: int(malignant[folds == fold].sum()) for name, fold in parts.items() if (folds == fold).any()}
    shown = f"{int(malignant.sum())} of {len(malignant)} rows malignant ({malignant.mean():.2%}); " + ", ".join(
        f"{name} {count}" for name, count in counts.items()
    )
    lowest = min(counts.values())
    verdict = "fail" if lowest == 0 else "warn" if lowest < limits.min_malignant else "ok"
    return Verdict("label balance", verdict, shown)


def _near_duplicates(version: DatasetVersion, limits: CheckLimits, on_progress: Callable[[int, int], None]) -> Verdict:
    """Pictures in different splits that look the same: by perceptual hash, then by comparing the pictures."""
    name = "near-duplicates across splits"
    lesions = version.lesions
    if version.images_path is None:
        return Verdict(name, "ok", "the data set has no pictures")
    if "perceptual_hash" not in lesions:
        return Verdict(name, "warn", "not checked: prepared with decode_check = false")
    near = near_pairs(lesions["perceptual_hash"].to_numpy(np.uint64), lesions["fold"].to_numpy(np.int64))
    pairs = near.pairs[: limits.max_compared_pairs]
    same = []
    with ImageReader(version.images_path) as reader:
        for number, (first, second) in enumerate(pairs.tolist(), start=1):
            alike = similarity(*(_compared(reader, lesions, row) for row in (first, second)))
            if alike >= limits.min_similarity:
                same.append((first, second))
            on_progress(number, len(pairs))
    cut = not near.complete or len(near.pairs) > len(pairs)
    compared = f"{len(pairs)} pairs of similar hash compared{' (the nearest ones; there are more)' if cut else ''}"
    if not same:
        return Verdict(name, "ok" if not cut else "warn", f"none; {compared}")
    first, second = (lesions["id"].iloc[row] for row in same[0])
    return Verdict(name, "fail", f"{len(same)} pairs show the same, e.g. {first} and {second}; {compared}")


def _compared(reader: ImageReader, lesions: pd.DataFrame, row: int) -> np.ndarray:
    image_id, offset, size = (lesions[column].iat[row] for column in ("id", "offset", "size"))
    return thumbnail(decode_image(reader.read(str(image_id), int(offset), int(size))), COMPARED_SIDE)


def _malignant(version: DatasetVersion) -> np.ndarray:
    """bool (N,)."""
    return version.task.malignant_mask[version.lesions["label"].to_numpy(np.int64)]
