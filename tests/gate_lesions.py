"""A prepared data set of small pictures whose labels the tiny network of one seed knows, and bundles made of it."""

from __future__ import annotations

from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd

from data_pipelines.batch_scoring import ScoredImages
from data_pipelines.dataset_version import SplitSettings, prepare_version
from data_pipelines.image_dataset import DatasetVersion, open_dataset
from data_pipelines.image_reader import ImageReader
from modeling.bundle import Bundle
from modeling.onnxruntime_engine import OnnxRuntimeEngine
from modeling.preprocessing import decode_image, resize
from tests.tiny_bundle import SIZE, expected_outputs, tiny_bundle, tiny_task


def make_lesions(folder: Path, number: int = 240, extra: int = 0) -> DatasetVersion:
    """One lesion a patient, a third malignant, half of the patients in the gate split; `extra` adds patients."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (number + extra, 1, 1, 3), dtype=np.uint8)
    images = np.repeat(np.repeat(images, SIZE, 1), SIZE, 2)
    logits, _ = expected_outputs(images)
    score = logits[:, 1] - logits[:, 0]
    names = [f"ISIC_{index:04d}" for index in range(number + extra)]
    with h5py.File(folder / "images.hdf5", "w") as file:
        for name, image in zip(names, images, strict=True):
            file[name] = np.void(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
    columns = np.random.default_rng(8)
    table = pd.DataFrame(
        {
            "isic_id": names,
            "patient_id": [f"P{index:04d}" for index in range(number + extra)],
            "target": (score > np.quantile(score[:number], 0.66)).astype(int),
            "age_approx": columns.integers(20, 80, number + extra),
            "sex": columns.choice(["female", "male"], number + extra),
        }
    )
    table.to_csv(folder / "metadata.csv", index=False)
    split = SplitSettings(num_folds=2, gate_fraction=0.5, seed=0)
    out = folder.parent / "dataset"
    made = prepare_version(
        str(folder / "images.hdf5"), str(folder / "metadata.csv"), str(out), tiny_task(), split, False, lambda _: None
    )
    return open_dataset(made["dataset"])


def bundle_of(directory: Path, version: DatasetVersion, seed: int = 0, **options) -> Bundle:
    """A tiny bundle that says it was trained on this version; seed 0 knows its labels, another guesses."""
    return tiny_bundle(directory, network_seed=seed, dataset_digest=version.digest, **options)


def stream_in_process(calls: list[int] | None = None):
    """`stream_scores` without Ray: the same pictures through the same engine; `calls` gets the rows of each call."""

    def stream_scores(images, rows, onnx_path, input_size, options):
        if calls is not None:
            calls.append(len(rows))
        engine = OnnxRuntimeEngine(onnx_path)
        with ImageReader(images) as reader:
            data = list(reader.read_many(rows.ids, rows.offset, rows.size))
        for start in range(0, len(rows), 50):
            part = np.arange(start, min(start + 50, len(rows)))
            pixels = np.stack([resize(decode_image(data[row]), input_size) for row in part])
            logits = engine.run(pixels).logits.astype(np.float64)
            yield ScoredImages(part, logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    return stream_scores
