"""The same network with smaller numbers: float16, and int8 by static quantisation with symmetric Q/DQ pairs.

One int8 file serves every engine: ONNX Runtime and OpenVINO fuse the pairs into integer kernels, and TensorRT's parser
takes only symmetric ones with float biases.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.engine_interface import INPUT

# The layers that hold nearly all arithmetic. Between them everything stays float32.
_LAYERS = ("Conv", "MatMul", "Gemm")
_CALIBRATION_BATCH = 4
_PROCESSOR = Path("/proc/cpuinfo")


class Int8Recipe(BaseModel):
    """How a network is quantised.

    `calibration` finds each tensor's range: its extremes, or a percentile that cuts rare outliers off. `float_layers`
    is the share of the layers, most disturbed first, that stay float32.
    """

    model_config = ConfigDict(extra="forbid")

    pictures: int = Field(64, ge=1, le=4096, description="training pictures to calibrate with")
    calibration: Literal["minmax", "percentile"] = "minmax"
    percentile: float = Field(99.99, gt=50, le=100)
    float_layers: float = Field(0.0, ge=0, le=1)
    weight_bits: Literal[7, 8] | None = Field(None, description="null: 8 where `sums_int8_exactly`, else 7")


def sums_int8_exactly() -> bool:
    """Whether this processor adds products of 8-bit numbers in 32 bits (VNNI, AMX; ARM's dot products).

    AVX2 alone adds pairs of them in 16 bits, which overflow: of two weights near 127 in one channel OpenVINO kept half
    of the sum (embedding off by 40 % of its range); with 7-bit weights it is exact.
    """
    if not _PROCESSOR.exists():
        return True
    text = _PROCESSOR.read_text(encoding="utf-8", errors="replace")
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    return not flags or bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


def write_float16(source: Path, target: Path) -> None:
    """Writes the network with float16 weights and arithmetic; inputs and outputs keep their types."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), str(target))


def write_int8(source: Path, target: Path, pictures: np.ndarray, recipe: Int8Recipe) -> list[str]:
    """Writes the network with int8 weights (per channel) and activations (per tensor) around its layers.

    Args:
        pictures: uint8 (N, S, S, 3) of the training rows, as the network reads them: quantisation is fitted on them.

    Returns:
        The names of the layers that stay float32.
    """
    with _quiet(), tempfile.TemporaryDirectory(prefix="dermray-int8-") as folder:
        prepared, ranges = Path(folder) / "prepared.onnx", Path(folder) / "ranges.json"
        _prepare(source, prepared)
        if not recipe.float_layers:
            _quantise(prepared, target, pictures, recipe, [], ranges)
            return []
        attempt = Path(folder) / "attempt.onnx"
        _quantise(prepared, attempt, pictures, recipe, [], ranges)
        excluded = _most_disturbed(prepared, attempt, pictures[:1], recipe.float_layers)
        _quantise(prepared, target, pictures, recipe, excluded, ranges)
        return excluded


def _prepare(source: Path, target: Path) -> None:
    """Shapes are inferred, batch normalisation is folded into the layers before it, and every node has a name."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    model = onnx.load(target)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(model, target)


def _quantise(
    source: Path, target: Path, pictures: np.ndarray, recipe: Int8Recipe, excluded: list[str], ranges: Path
) -> None:
    """Writes the quantised network; the tensors' ranges are measured once and kept in the file `ranges`."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    quantize_static(
        str(source),
        str(target),
        _reader(pictures),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_LAYERS),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        reduce_range=not sums_int8_exactly() if recipe.weight_bits is None else recipe.weight_bits == 7,
        nodes_to_exclude=excluded,
        calibrate_method=methods[recipe.calibration],
        calibration_cache_path=ranges,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            # Biases stay float: weights need no coarser scale for the sake of int32 ones.
            "QDQDisableWeightAdjustForInt32Bias": True,
            "CalibTensorRangeSymmetric": True,
            "CalibPercentile": recipe.percentile,
            # All tensors of one batch are held at once: of a whole set it would be hundreds of gigabytes.
            "CalibStridedMinMax": 1,
        },
    )


def _most_disturbed(source: Path, quantised: Path, pictures: np.ndarray, share: float) -> list[str]:
    """The layers that read or write the tensors with the least signal over quantisation noise."""
    import onnx
    from onnxruntime.quantization import qdq_loss_debug as loss

    with tempfile.TemporaryDirectory(prefix="dermray-int8-") as folder:
        augmented = str(Path(folder) / "augmented.onnx")
        loss.modify_model_output_intermediate_tensors(str(quantised), augmented)
        # Every tensor of the network is held at once: one picture of six EfficientNets with four views is a gigabyte.
        found = loss.collect_activations(augmented, _reader(pictures, batch=1))
    pairs = loss.create_activation_matching(found)
    noise = loss.compute_signal_to_quantization_noice_ratio
    ratios = {name: noise(pair["pre_qdq"], pair["post_qdq"]) for name, pair in pairs.items()}
    ranked = sorted(ratios, key=lambda name: ratios[name])
    nodes = [node for node in onnx.load(source).graph.node if node.op_type in _LAYERS]
    wanted = max(1, round(share * len(nodes)))
    chosen: list[str] = []
    for tensor in ranked:
        touching = [node.name for node in nodes if tensor in (*node.input, *node.output)]
        chosen += [name for name in touching if name not in chosen]
        if len(chosen) >= wanted:
            break
    return chosen[:wanted]


def _reader(pictures: np.ndarray, batch: int = _CALIBRATION_BATCH) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Batches of the pictures; `set_range` chooses which ones are read next."""

        def __init__(self) -> None:
            # Whole batches: the last one is filled from the start.
            count = -(-len(pictures) // batch) * batch
            self._rows = (np.arange(count) % len(pictures)).reshape(-1, batch)
            self.set_range(0, len(self._rows))

        def __len__(self) -> int:
            return len(self._rows)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(self._rows[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            rows = next(self._left, None)
            return None if rows is None else {INPUT: pictures[rows]}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters warn, for every small constant, through the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
