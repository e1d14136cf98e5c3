"""Networks in smaller numbers: what the files hold, and that they still are the network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from modeling.network_precision import Int8Recipe, sums_int8_exactly, write_float16, write_int8
from modeling.onnxruntime_engine import OnnxRuntimeEngine
from modeling.openvino_engine import OpenVinoEngine
from tests.tiny_bundle import SIZE, expected_outputs, write_onnx


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "fp32.onnx"
    write_onnx(path)
    return path


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def values_of(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_float16_halves_the_weights_and_keeps_inputs_and_outputs(source, tmp_path):
    write_float16(source, tmp_path / "fp16.onnx")
    model = onnx.load(tmp_path / "fp16.onnx")
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}
    assert [node.type.tensor_type.elem_type for node in model.graph.input] == [TensorProto.UINT8]
    output = OnnxRuntimeEngine(tmp_path / "fp16.onnx").run(pictures(4), with_cam=True)
    assert output.logits.dtype == output.embedding.dtype == output.cam.dtype == np.float32
    logits, _ = expected_outputs(pictures(4))
    difference = np.abs(output.logits - logits).max()
    assert 0 < difference < 0.01


@pytest.fixture(scope="module")
def int8(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "int8.onnx"
    assert write_int8(source, path, pictures(9), Int8Recipe(pictures=9)) == []
    return path


def test_int8_pairs_are_symmetric_with_float_biases_as_tensorrt_wants_them(int8):
    model = onnx.load(int8)
    values = values_of(model)
    quantisers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantisers
    for node in quantisers:
        zero_point = values[node.input[2]]
        assert zero_point.dtype == np.int8 and not zero_point.any()
    assert not any(value.dtype == np.int32 for value in values.values())


def test_int8_weights_have_a_scale_per_channel(int8):
    model = onnx.load(int8)
    values = values_of(model)
    weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values]
    assert sorted(len(values[node.input[1]]) for node in weights) == [2, 8]


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_int8_engines_compute_the_network_within_its_resolution(int8, engine):
    logits, embedding = expected_outputs(pictures(32, seed=1))
    output = engine(int8).run(pictures(32, seed=1), with_cam=True)
    assert 0 < np.abs(output.embedding - embedding).max() < 0.02 * np.abs(embedding).max()
    assert np.abs(output.logits - logits).max() < 0.03 * np.abs(logits).max()
    np.testing.assert_allclose(output.cam.mean(axis=(2, 3)), output.logits, atol=1e-4)


def test_weights_have_seven_bits_where_sums_of_eight_overflow(source, tmp_path):
    """AVX2 without VNNI adds pairs of products in 16 bits."""
    largest = {}
    for bits in (7, 8):
        path = tmp_path / f"{bits}.onnx"
        write_int8(source, path, pictures(8), Int8Recipe(pictures=8, weight_bits=bits))
        values = values_of(onnx.load(path))
        largest[bits] = max(np.abs(v.astype(int)).max() for v in values.values() if v.dtype == np.int8 and v.ndim == 4)
    assert largest[7] <= 64 < largest[8] <= 127


@pytest.mark.parametrize(
    ("flags", "exact"), [("fma avx2", False), ("avx2 avx512_vnni", True), ("avx2 avx_vnni", True), ("", True)]
)
def test_the_processor_says_how_it_sums(monkeypatch, tmp_path, flags, exact):
    (tmp_path / "cpuinfo").write_text(f"model name : X\nflags\t\t: {flags}\nbogomips : 1\n")
    monkeypatch.setattr("modeling.network_precision._PROCESSOR", tmp_path / "cpuinfo")
    assert sums_int8_exactly() is exact


def test_the_ranges_come_from_the_pictures(source, tmp_path):
    """Calibrated on dark pictures alone, bright ones are cut off."""
    dark = pictures(8) // 8
    write_int8(source, tmp_path / "dark.onnx", dark, Int8Recipe(pictures=8))
    engine = OnnxRuntimeEngine(tmp_path / "dark.onnx")
    assert np.abs(engine.run(dark).logits - expected_outputs(dark)[0]).max() < 0.02
    assert np.abs(engine.run(pictures(8)).logits - expected_outputs(pictures(8))[0]).max() > 0.2


def test_a_percentile_cuts_what_is_rare(source, tmp_path):
    """One white picture among dark ones sets the scale of the extremes, not that of the 99th percentile."""
    mixed = pictures(256) // 8
    mixed[0] = 255
    scales = {}
    for calibration in ("minmax", "percentile"):
        recipe = Int8Recipe(pictures=256, calibration=calibration, percentile=99)
        write_int8(source, tmp_path / f"{calibration}.onnx", mixed, recipe)
        model = onnx.load(tmp_path / f"{calibration}.onnx")
        values = values_of(model)
        scales[calibration] = max(
            float(values[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"
        )
    assert scales["percentile"] < scales["minmax"] / 3


def test_the_most_disturbed_layers_stay_float(source, tmp_path):
    kept = write_int8(source, tmp_path / "half.onnx", pictures(8), Int8Recipe(pictures=8, float_layers=0.5))
    model = onnx.load(tmp_path / "half.onnx")
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    dequantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert [node.name for node in layers if not dequantised & set(node.input)] == kept
    assert len(kept) == len(layers) // 2 == 1
    all_kept = write_int8(source, tmp_path / "none.onnx", pictures(8), Int8Recipe(pictures=8, float_layers=1.0))
    assert len(all_kept) == len(layers)
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "none.onnx").graph.node)
