"""Networks in smaller numbers: what the files hold, and that they still are the network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from modeling.layer_sensitivity import depth_blocks, last_layers, layer_depths, most_sensitive
from modeling.network_precision import Int8Recipe, cpu_activations, write_float16, write_int8
from modeling.onnxruntime_engine import OnnxRuntimeEngine
from modeling.openvino_engine import OpenVinoEngine
from tests.tiny_bundle import SIZE, write_onnx


def write_chain(path, first=None, high=1e9, last=None):
    """The tiny bundle's network with two layers more: mixing (8, 3), what lies above `high` cut off, middle (8, 8), and
    the same head. `first` and `last` replace the weights of mixing and middle."""
    write_onnx(path)
    model = onnx.load(path)
    middle = np.random.default_rng(4).normal(size=(8, 8, 1, 1)).astype(np.float32)
    added = {"low": np.float32(0), "high": np.float32(high), "middle": middle}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in added.items())
    nodes = list(model.graph.node)
    position = [node.op_type for node in nodes].index("Conv") + 1
    nodes[position - 1].output[0] = "mixed"
    nodes[position:position] = [
        onnx.helper.make_node("Clip", ["mixed", "low", "high"], ["cut"]),
        onnx.helper.make_node("Conv", ["cut", "middle"], ["raw"]),
        onnx.helper.make_node("Relu", ["raw"], ["features"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        value = {"mixing": first, "middle": last}.get(tensor.name)
        if value is not None:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    onnx.save(model, path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "fp32.onnx"
    write_chain(path)
    return path


def answers(path, images):
    return OnnxRuntimeEngine(path).run(images, with_cam=True)


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
    difference = np.abs(output.logits - answers(source, pictures(4)).logits).max()
    assert 0 < difference < 0.01


def quantised(source, path, calibration=None, activations="int8", **recipe):
    """Writes the int8 network; returns the layers that stay float32."""
    return write_int8(
        source, path, pictures(9) if calibration is None else calibration, Int8Recipe(**recipe), activations
    )


@pytest.fixture(scope="module")
def int8(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "int8.onnx"
    assert quantised(source, path) == []
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


def test_int8_weights_have_a_scale_per_channel_and_the_head_stays_float(int8):
    model = onnx.load(int8)
    values = values_of(model)
    weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values]
    assert [len(values[node.input[1]]) for node in weights] == [8, 8]
    assert values["head"].dtype == np.float32


def test_a_layers_range_is_what_the_next_one_reads(tmp_path):
    """Of mixed colours up to 2 an activation function leaves 0.01: they have 127 steps up to there, not up to 2."""
    write_chain(tmp_path / "cut.onnx", high=0.01)
    quantised(tmp_path / "cut.onnx", tmp_path / "int8.onnx")
    written = onnx.load(tmp_path / "int8.onnx")
    values = values_of(written)
    steps = {n.input[0]: float(values[n.input[1]]) for n in written.graph.node if n.op_type == "QuantizeLinear"}
    assert len(steps) == 2 and min(steps.values()) == pytest.approx(0.01 / 127, rel=0.01)


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_int8_engines_compute_the_network_within_its_resolution(source, tmp_path, engine):
    quantised(source, tmp_path / "int8.onnx", activations=cpu_activations())
    expected = answers(source, pictures(32, seed=1))
    output = engine(tmp_path / "int8.onnx").run(pictures(32, seed=1), with_cam=True)
    assert 0 < np.abs(output.embedding - expected.embedding).max() < 0.03 * np.abs(expected.embedding).max()
    assert np.abs(output.logits - expected.logits).max() < 0.04 * np.abs(expected.logits).max()
    np.testing.assert_allclose(output.cam.mean(axis=(2, 3)), output.logits, atol=1e-4)


def test_inputs_have_seven_bits_where_sums_of_eight_overflow(source, tmp_path):
    """AVX2 without VNNI adds pairs of products in 16 bits: the calibrated range takes half of uint8's values."""
    steps = {}
    for activations in ("uint7", "uint8"):
        quantised(source, tmp_path / f"{activations}.onnx", activations=activations)
        model = onnx.load(tmp_path / f"{activations}.onnx")
        values = values_of(model)
        quantisers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        steps[activations] = {n.input[0]: (float(values[n.input[1]]), int(values[n.input[2]])) for n in quantisers}
        weights = [value for value in values.values() if value.dtype == np.int8 and value.ndim == 4]
        assert max(np.abs(value.astype(int)).max() for value in weights) == 127
    assert steps["uint7"].keys() == steps["uint8"].keys()
    for name, (step, zero) in steps["uint8"].items():
        half = steps["uint7"][name]
        # 255 steps up from the lower end and 127 wider ones reach the same upper end.
        assert half[0] * (127 - half[1]) == pytest.approx(step * (255 - zero), abs=half[0])
        assert half[0] * half[1] == pytest.approx(step * zero, abs=half[0])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx2", "uint7"), ("avx2 avx512_vnni", "uint8"), ("avx2 avx_vnni", "uint8"), ("", "uint8")],
)
def test_the_processor_says_how_it_sums(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"model name : X\nflags\t\t: {flags}\nbogomips : 1\n")
    monkeypatch.setattr("modeling.network_precision._PROCESSOR", tmp_path / "cpuinfo")
    assert cpu_activations() == expected


def test_the_ranges_come_from_the_pictures(source, tmp_path):
    """Calibrated on dark pictures alone, bright ones are cut off."""
    dark = pictures(8) // 8
    quantised(source, tmp_path / "dark.onnx", dark, cpu_activations())

    def error(images):
        return np.abs(answers(tmp_path / "dark.onnx", images).logits - answers(source, images).logits).max()

    assert error(dark) < 0.1 and error(pictures(8)) > 0.5


@pytest.mark.parametrize("activations", ["int8", "uint8", "uint7"])
def test_a_percentile_cuts_what_is_rare(source, tmp_path, activations):
    """One white picture among dark ones sets the scale of the extremes, not that of the 99th percentile."""
    mixed = pictures(256) // 8
    mixed[0] = 255
    scales = {}
    for calibration in ("minmax", "percentile"):
        recipe = Int8Recipe(calibration=calibration, percentile=99)
        write_int8(source, tmp_path / f"{calibration}.onnx", mixed, recipe, activations)
        model = onnx.load(tmp_path / f"{calibration}.onnx")
        values = values_of(model)
        scales[calibration] = max(
            float(values[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"
        )
    assert scales["percentile"] < scales["minmax"] / 3


def test_the_most_sensitive_layers_stay_float(tmp_path):
    """One colour mixed a thousand times as strongly as the others leaves these no step of the middle layer's input."""
    first, last = np.ones((8, 3, 1, 1)), np.ones((8, 8, 1, 1))
    first[0], last[:, 0] = 1000, 0
    write_chain(tmp_path / "source.onnx", first=first, last=last)
    kept = quantised(tmp_path / "source.onnx", tmp_path / "half.onnx", float_layers=0.5)
    written = onnx.load(tmp_path / "half.onnx")
    layers = [node for node in written.graph.node if node.op_type == "Conv"]
    dequantised = {name for node in written.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert [bool(dequantised & set(node.input)) for node in layers] == [True, False, False]
    assert kept == [layers[1].name]


def test_all_layers_may_stay_float(source, tmp_path):
    assert len(quantised(source, tmp_path / "none.onnx", float_layers=1.0)) == 2
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "none.onnx").graph.node)


def chain(*depths):
    """Layers in a row of networks side by side: `depths` says how many layers each network has."""
    nodes = []
    for network, length in enumerate(depths):
        for depth in range(length):
            before = "images" if depth == 0 else f"{network}-{depth - 1}"
            name = f"{network}-{depth}"
            nodes.append(onnx.helper.make_node("Conv", [before, "w"], [f"raw {name}"], name=name))
            nodes.append(onnx.helper.make_node("Relu", [f"raw {name}"], [name]))
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "chain", [], []))


def test_layers_of_one_position_in_an_ensemble_share_a_block():
    depths = layer_depths(chain(10, 10), ["Conv"])
    assert depths == {f"{network}-{depth}": depth for network in (0, 1) for depth in range(10)}
    blocks = depth_blocks(depths, 4)
    assert sorted(sum(blocks, [])) == sorted(depths) and [len(block) for block in blocks] == [6, 4, 6, 4]
    assert blocks[0] == ["0-0", "1-0", "0-1", "1-1", "0-2", "1-2"]


def test_heads_are_the_layers_with_none_behind_them():
    assert last_layers(chain(3, 2), ["Conv"]) == ["0-2", "1-1"]


def test_blocks_are_kept_in_the_order_of_their_harm_until_the_share_is_reached():
    model = chain(8)
    harm = {"0-2": 3.0, "0-5": 2.0}
    layers = list(layer_depths(model, ["Conv"]))
    chosen = {share: most_sensitive(model, layers, share, lambda b: harm.get(b[0], 0)) for share in (0.1, 0.125, 0.2)}
    assert chosen == {0.1: ["0-2"], 0.125: ["0-2"], 0.2: ["0-2", "0-5"]}
