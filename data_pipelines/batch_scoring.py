"""Scores many pictures: Ray Data streams them through engine actors; only small results come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import ray.data

from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.image_dataset import read_images, task_cpus
from data_pipelines.image_reader import JoinedFiles
from modeling.embedding_distance import EmbeddingDistance
from modeling.onnxruntime_engine import OnnxRuntimeEngine

QUALITY_COLUMNS = ("brightness", "contrast", "blur", "red", "green", "blue")


@dataclass
class ScoredImages:
    """Results of some rows; those in `errors` hold NaN.

    Attributes:
        row: int64 (N,), positions in the rows asked for.
        log_probabilities: float64 (N, K), log-softmax of the logits.
        embedding: float32 (N, D), or (N, P) with a projection; None unless asked for.
        quality: column name -> float64 (N,), empty unless asked for.
        errors: position in these arrays -> reason, for pictures that could not be read or decoded.
        distance: float32 (N,), of the embeddings from those of training; None unless asked for.
    """

    row: np.ndarray
    log_probabilities: np.ndarray
    embedding: np.ndarray | None = None
    quality: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    distance: np.ndarray | None = None


class EngineScorer:
    """A Ray Data actor around an engine: adds logits and, where asked for, the (projected) embedding and its distance
    from training."""

    def __init__(self, onnx_path: str, options: ScoringOptions):
        self.engine = OnnxRuntimeEngine(onnx_path, threads=options.threads)
        self.options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        output = self.engine.run(np.ascontiguousarray(batch.pop("image")))
        batch["logits"] = output.logits
        if self.options.distance is not None:
            batch["distance"] = self.options.distance(output.embedding)
        if self.options.with_embedding:
            embedding = output.embedding
            if self.options.projection is not None:
                matrix, mean = self.options.projection
                embedding = (embedding - mean) @ matrix
            batch["embedding"] = embedding.astype(np.float32)
        return batch


@dataclass(frozen=True)
class ScoringOptions:
    """How pictures are scored.

    Attributes:
        with_embedding: keep the embedding, projected when `projection` (matrix, mean) is given.
        distance: measure how far each embedding lies from those of training.
        with_quality: measure brightness, contrast, blur and colour as well.
        num_scorers: engine actors; threads: of each; batch_size: pictures an engine takes at once.
    """

    with_embedding: bool = False
    projection: tuple[np.ndarray, np.ndarray] | None = None
    distance: EmbeddingDistance | None = None
    with_quality: bool = False
    num_scorers: int = 1
    threads: int = 1
    batch_size: int = 64


def stream_scores(
    images_path: str | JoinedFiles, rows: ImageRows, onnx_path: str, input_size: int, options: ScoringOptions
) -> Iterator[ScoredImages]:
    """Scores `rows` of an HDF5 file with an exported network and yields them batch by batch, in the file's order, so
    that memory does not grow with their number. `ScoredImages.row` says which rows a batch holds.

    Raises:
        ValueError: the file cannot be read at all (single bad pictures are reported in `errors`).
    """
    if not len(rows):
        return
    recipe = DecodeRecipe(input_size, with_quality=options.with_quality, mark_errors=True)
    dataset = read_images(LesionImageDatasource(images_path, rows, recipe)).map_batches(
        EngineScorer,
        fn_constructor_args=(onnx_path, options),
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.num_scorers),
        num_cpus=task_cpus(),
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        logits = batch["logits"].astype(np.float64)
        log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        errors = {position: str(text) for position, text in enumerate(batch["error"]) if text}
        embedding = np.array(batch["embedding"]) if "embedding" in batch else None
        bad = list(errors)
        log_probabilities[bad] = np.nan
        if embedding is not None:
            embedding[bad] = np.nan
        distance = np.array(batch["distance"]) if "distance" in batch else None
        if distance is not None:
            distance[bad] = np.nan
        quality = {name: np.array(batch[name]) for name in QUALITY_COLUMNS if name in batch}
        yield ScoredImages(np.array(batch["row"]), log_probabilities, embedding, quality, errors, distance)


def score_images(
    images_path: str | JoinedFiles, rows: ImageRows, onnx_path: str, input_size: int, options: ScoringOptions
) -> ScoredImages:
    """`stream_scores` in one piece, in the order of `rows`; for sets that fit in memory."""
    parts = list(stream_scores(images_path, rows, onnx_path, input_size, options))
    row = np.concatenate([part.row for part in parts])
    position = np.argsort(row, kind="stable")
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    distances = [part.distance for part in parts if part.distance is not None]
    return ScoredImages(
        row[position],
        np.concatenate([part.log_probabilities for part in parts])[position],
        np.concatenate(embeddings)[position] if embeddings else None,
        {name: np.concatenate([part.quality[name] for part in parts])[position] for name in parts[0].quality},
        {int(part.row[at]): reason for part in parts for at, reason in part.errors.items()},
        np.concatenate(distances)[position] if distances else None,
    )
