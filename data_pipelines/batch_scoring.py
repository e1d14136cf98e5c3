"""Scores many pictures: Ray Data streams them through engine actors; only small results come back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import ray.data

from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.image_dataset import read_images, task_cpus
from modeling.engines import OnnxRuntimeEngine

QUALITY_COLUMNS = ("brightness", "contrast", "blur", "red", "green", "blue")
PROGRESS_SECONDS = 5.0


@dataclass
class ScoredImages:
    """Results in the order of the rows asked for; rows in `errors` hold NaN.

    Attributes:
        log_probabilities: float64 (N, K), log-softmax of the logits.
        embedding: float32 (N, D), or (N, P) with a projection; None unless asked for.
        quality: column name -> float64 (N,), empty unless asked for.
        errors: position -> reason for pictures that could not be read or decoded.
    """

    log_probabilities: np.ndarray
    embedding: np.ndarray | None = None
    quality: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class EngineScorer:
    """A Ray Data actor around an engine: adds logits and, where asked for, the (projected) embedding."""

    def __init__(
        self, onnx_path: str, threads: int, with_embedding: bool, projection: tuple[np.ndarray, np.ndarray] | None
    ):
        self.engine = OnnxRuntimeEngine(onnx_path, threads=threads)
        self.with_embedding, self.projection = with_embedding, projection

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        output = self.engine.run(np.ascontiguousarray(batch.pop("image")))
        batch["logits"] = output.logits
        if self.with_embedding:
            embedding = output.embedding
            if self.projection is not None:
                matrix, mean = self.projection
                embedding = (embedding - mean) @ matrix
            batch["embedding"] = embedding.astype(np.float32)
        return batch


def score_images(
    images_path: str,
    rows: ImageRows,
    onnx_path: str,
    input_size: int,
    *,
    with_embedding: bool = False,
    projection: tuple[np.ndarray, np.ndarray] | None = None,
    with_quality: bool = False,
    num_scorers: int = 1,
    threads: int = 1,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> ScoredImages:
    """Scores `rows` of an HDF5 file with an exported network.

    Args:
        on_progress: called with (rows done, rows in total) every few seconds.

    Raises:
        ValueError: the file cannot be read at all (single bad pictures are reported in `errors`).
    """
    recipe = DecodeRecipe(input_size, with_quality=with_quality, mark_errors=True)
    dataset = read_images(LesionImageDatasource(images_path, rows, recipe)).map_batches(
        EngineScorer,
        fn_constructor_args=(onnx_path, threads, with_embedding, projection),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_scorers),
        num_cpus=task_cpus(),
    )
    order: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {}
    errors: dict[int, str] = {}
    done, last = 0, time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        order.append(batch["row"])
        for name in ("logits", "embedding", *QUALITY_COLUMNS):
            if name in batch:
                parts.setdefault(name, []).append(batch[name])
        errors |= {int(row): str(text) for row, text in zip(batch["row"], batch["error"], strict=True) if text}
        done += len(batch["row"])
        if on_progress is not None and time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            on_progress(done, len(rows))
    position = np.argsort(np.concatenate(order), kind="stable")
    columns = {name: np.concatenate(values)[position] for name, values in parts.items()}
    logits = columns.pop("logits").astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    embedding = columns.pop("embedding", None)
    bad = sorted(errors)
    log_probabilities[bad] = np.nan
    if embedding is not None:
        embedding[bad] = np.nan
    return ScoredImages(log_probabilities, embedding, columns, errors)
