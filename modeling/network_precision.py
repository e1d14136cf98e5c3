"""The same network with smaller numbers: float16, and int8 by static quantisation with Q/DQ pairs.

Layers have quantised inputs and weights, and write float32. A pair right behind a convolution would have to span what
the activation function cuts off: on one EfficientNet-lite0 of HAM10000 AUC fell by 0.044 with such pairs, by 0.003
without. Whoever else reads a layer's input, a residual sum for one, reads it quantised. The heads, which cost next to
nothing, stay float32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.engine_interface import INPUT, LOGITS
from modeling.layer_sensitivity import last_layers, layer_depths, most_sensitive
from modeling.steady_line import steadily

Activations = Literal["int8", "uint8", "uint7"]
# The layers that hold nearly all arithmetic.
_LAYERS = ("Conv", "MatMul", "Gemm")
_CALIBRATION_BATCH = 4
# Enough to tell which layers matter: they differ by factors.
_SENSITIVITY_PICTURES = 8
_PROCESSOR = Path("/proc/cpuinfo")


class Int8Recipe(BaseModel):
    """How a network is quantised.

    `calibration` finds each tensor's range: its extremes, or a percentile that cuts rare outliers off. `float_layers`
    is the share of the layers, most sensitive first, that stay float32.
    """

    model_config = ConfigDict(extra="forbid")

    pictures: int = Field(64, ge=1, le=4096, description="training pictures to calibrate with")
    calibration: Literal["minmax", "percentile"] = "minmax"
    percentile: float = Field(99.99, gt=50, le=100)
    float_layers: float = Field(0.0, ge=0, le=1)


def cpu_activations() -> Activations:
    """What a layer's inputs are quantised to for engines on this processor: uint8, or uint7 (0 to 127 in 8 bits) where
    it cannot add products of 8-bit numbers in 32 bits (VNNI, AMX; ARM's dot products).

    AVX2 alone adds pairs of such products in 16 bits, which overflow: of 255 * 127 twice half was lost, and an engine's
    AUC with it. With half the inputs' range the sums are exact, at less noise than with half the weights' (mean
    difference of a probability 0.037 instead of 0.069). Inputs beyond the calibrated range are not cut off before twice
    its end and may overflow: the comparison on lesions would see it.
    """
    if not _PROCESSOR.exists():
        return "uint8"
    text = _PROCESSOR.read_text(encoding="utf-8", errors="replace")
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    return "uint8" if not flags or flags & {"avx512_vnni", "avx_vnni", "amx_int8"} else "uint7"


def write_float16(source: Path, target: Path) -> None:
    """Writes the network with float16 weights and arithmetic; inputs and outputs keep their types."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), str(target))


def write_int8(
    source: Path,
    target: Path,
    pictures: np.ndarray,
    recipe: Int8Recipe,
    activations: Activations,
    say: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Writes the network with int8 weights (per channel) and inputs (per tensor) of its layers.

    Args:
        pictures: uint8 (N, S, S, 3) of the training rows, as the network reads them: quantisation is fitted on them.
        activations: `cpu_activations()` for engines on this processor; int8, with symmetric ranges, for TensorRT, whose
            parser takes no others.
        say: receives steady progress lines.

    Returns:
        The names of the layers, other than the heads, that stay float32.
    """
    import onnx

    with _quiet(), tempfile.TemporaryDirectory(prefix="dermray-int8-") as folder:
        prepared, ranges, attempt = (Path(folder) / name for name in ("prepared.onnx", "ranges.json", "attempt.onnx"))
        _prepare(source, prepared)
        model = onnx.load(prepared)
        heads = last_layers(model, _LAYERS)
        layers = [name for name in layer_depths(model, _LAYERS) if name not in heads]

        def quantise(path: Path, kept: list[str]) -> None:
            _quantise(prepared, path, pictures, recipe, activations, kept + heads, ranges, say)

        if not recipe.float_layers:
            quantise(target, [])
            return []
        few = pictures[:_SENSITIVITY_PICTURES]
        expected = _logits(prepared, few)

        def disturbance(alone: list[str]) -> float:
            say(f"quantising {len(alone)} of {len(layers)} layers alone")
            quantise(attempt, [name for name in layers if name not in alone])
            return float(np.abs(_logits(attempt, few) - expected).mean())

        kept = most_sensitive(model, layers, recipe.float_layers, disturbance)
        quantise(target, kept)
        return kept


def _logits(path: Path, pictures: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Whatever the processor: the integer kernels compute something else where they overflow.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run([LOGITS], {INPUT: pictures})[0]


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
    source: Path,
    target: Path,
    pictures: np.ndarray,
    recipe: Int8Recipe,
    activations: Activations,
    excluded: list[str],
    ranges: Path,
    say: Callable[[str], None],
) -> None:
    """Writes the quantised network; the tensors' ranges are measured once and kept in the file `ranges`."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    kind = QuantType.QInt8 if activations == "int8" else QuantType.QUInt8
    quantize_static(
        str(source),
        str(target),
        _reader(pictures, steadily(say, "calibrating: pictures", len(pictures))),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_LAYERS),
        per_channel=True,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        calibrate_method=methods[recipe.calibration],
        calibration_cache_path=ranges,
        extra_options={
            "ActivationSymmetric": activations == "int8",
            "WeightSymmetric": True,
            "QuantizeBias": False,
            # Biases stay float: weights need no coarser scale for the sake of int32 ones.
            "QDQDisableWeightAdjustForInt32Bias": True,
            "CalibTensorRangeSymmetric": activations == "int8",
            "CalibPercentile": recipe.percentile,
            "OpTypesToExcludeOutputQuantization": list(_LAYERS),
            # All tensors of one batch are held at once: of a whole set it would be hundreds of gigabytes.
            "CalibStridedMinMax": 1,
        },
    )
    if activations == "uint7":
        _narrow(target)


def _narrow(path: Path) -> None:
    """Doubles the scales of all inputs, so that the calibrated ranges take 0 to 127 of 0 to 255."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    quantisers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for scale, zero_point in {(node.input[1], node.input[2]) for node in quantisers}:
        values = {name: numpy_helper.to_array(tensors[name]) for name in (scale, zero_point)}
        wider = (values[scale] * np.float32(255 / 127)).astype(np.float32)
        lower = np.round(values[zero_point].astype(np.float64) * 127 / 255).astype(np.uint8)
        tensors[scale].CopyFrom(numpy_helper.from_array(wider, scale))
        tensors[zero_point].CopyFrom(numpy_helper.from_array(lower, zero_point))
    onnx.save(model, path)


def _reader(pictures: np.ndarray, progress: Callable[[int], None]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Batches of the pictures; `set_range` chooses which ones are read next."""

        def __init__(self) -> None:
            # Whole batches: the last one is filled from the start.
            count = -(-len(pictures) // _CALIBRATION_BATCH) * _CALIBRATION_BATCH
            self._rows = (np.arange(count) % len(pictures)).reshape(-1, _CALIBRATION_BATCH)
            self.set_range(0, len(self._rows))

        def __len__(self) -> int:
            return len(self._rows)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(self._rows[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            rows = next(self._left, None)
            if rows is not None:
                progress(int(rows[-1]) + 1)
            return None if rows is None else {INPUT: pictures[rows]}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters warn, for every small constant, through the root logger, and print."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(before)
