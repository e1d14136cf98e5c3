"""From the trained network to `image_scorer.onnx`, and the fixed pictures that every engine is compared on."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from modeling.image_scorer import ExportableScorer

INPUT_NAME = "images"
OUTPUT_NAMES = ("logits", "embedding", "cam")
OPSET = 18


def export_onnx(scorer: ExportableScorer, input_size: int, path: str | Path) -> None:
    """Writes the graph uint8 NHWC images -> logits (N, K), embedding (N, D), cam (N, K, h, w), with a dynamic batch.

    Traced with a batch of 2: a batch of 1 would be taken for a constant.
    """
    model = scorer.eval()
    example = torch.zeros((2, input_size, input_size, 3), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=[INPUT_NAME],
            output_names=list(OUTPUT_NAMES),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def write_parity(scorer: ExportableScorer, images: np.ndarray, path: str | Path) -> None:
    """Records torch's float32 answers on fixed pictures (uint8 (N, S, S, 3)), the reference for every engine."""
    with torch.inference_mode():
        logits, embedding, _ = scorer.eval()(torch.from_numpy(images))
    np.savez_compressed(path, images=images, logits=logits.numpy(), embedding=embedding.numpy())
