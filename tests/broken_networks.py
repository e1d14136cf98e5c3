"""Networks that claim to be a bundle's in int8 and are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from modeling.bundle import Bundle
from modeling.bundle_manifest import sha256_file
from modeling.engine_set import Candidate
from modeling.network_file import NetworkFile


def int8_network(path: Path) -> dict[str, str]:
    network = NetworkFile(uri=str(path), sha256=sha256_file(path), precision="int8", name="int8")
    return network.model_dump()


def changed(bundle: Bundle, path: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Candidate:
    """The bundle's network with its constants changed, as a candidate that claims to be int8."""
    model = onnx.load(bundle.onnx_path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(change(tensor.name, numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, path)
    choice = {"engine": "onnxruntime", "network": int8_network(path)}
    return Candidate(name=path.stem, choice=choice, precision="int8")


def four_bits(name: str, value: np.ndarray) -> np.ndarray:
    """Symmetric 4-bit weights, one scale per tensor."""
    if value.ndim != 4 or value.size < 10:
        return value
    scale = np.abs(value).max() / 7
    return (np.round(value / scale).clip(-8, 7) * scale).astype(value.dtype)


def wrong_normalisation(name: str, value: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 1 instead of around 0, the usual mistake: the shift by the mean is forgotten."""
    return np.zeros_like(value) if name.endswith(".shift") else value
