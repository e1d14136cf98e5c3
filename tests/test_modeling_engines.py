"""Engines compute the network's function, whatever the batch, and say clearly what they cannot do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from modeling.engines import BucketedEngine, OnnxRuntimeEngine, create_engine
from tests.tiny_bundle import SIZE, expected_outputs, tiny_bundle, write_onnx


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def pictures(count):
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("choice", [None, {"engine": "onnxruntime", "options": {"threads": 2}}])
@pytest.mark.parametrize("count", [1, 5, 32])
def test_outputs_equal_the_network_and_maps_average_to_logits(bundle, choice, count):
    engine = create_engine(bundle, choice)
    images = pictures(count)
    output = engine.run(images, with_cam=True)
    logits, embedding = expected_outputs(images)
    np.testing.assert_allclose(output.logits, logits, atol=1e-4)
    np.testing.assert_allclose(output.embedding, embedding, atol=1e-4)
    np.testing.assert_allclose(output.cam.mean(axis=(2, 3)), logits, atol=1e-4)
    assert output.logits.dtype == output.embedding.dtype == output.cam.dtype == np.float32
    assert engine.run(images).cam is None


def test_a_view_in_another_memory_order_gives_the_same_answer(bundle):
    engine = create_engine(bundle)
    images = pictures(4)
    np.testing.assert_array_equal(engine.run(images[:, :, ::-1]).logits, engine.run(images[:, :, ::-1].copy()).logits)


def test_idle_threads_do_not_spin(bundle):
    """Spinning threads of one replica would take the cores from the others."""
    options = create_engine(bundle)._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, SIZE, SIZE, 3), np.float32),
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((1, SIZE + 1, SIZE + 1, 3), np.uint8),
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
    ],
)
def test_wrong_input_is_named(bundle, images):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 16, 16, 3\)"):
        create_engine(bundle).run(images)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"engine": "abacus"}, "unknown engine 'abacus'; known engines: \\['onnxruntime'\\]"),
        ({}, "unknown engine None"),
        ({"engine": "onnxruntime", "thread": 1}, "unknown keys \\['thread'\\]"),
        ({"engine": "onnxruntime", "options": {"thread": 1}}, "option thread = 1"),
        ({"engine": "onnxruntime", "options": {"threads": 0}}, "option threads = 0"),
        ({"buckets": {"one": {"engine": "onnxruntime"}}}, "engine bucket 'one'"),
        ({"buckets": {"1": {"engine": "abacus"}}}, "unknown engine 'abacus'"),
        ({"buckets": {}}, "expected batch sizes"),
    ],
)
def test_a_wrong_choice_is_named(bundle, choice, message):
    with pytest.raises(ValueError, match=message):
        create_engine(bundle, choice)


def test_a_provider_that_is_not_installed_is_refused(bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ValueError, match="no CUDAExecutionProvider"):
        create_engine(bundle, {"engine": "onnxruntime", "options": {"provider": "cuda"}})


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        OnnxRuntimeEngine(path)
    assert "\n" not in str(caught.value)


def test_a_graph_without_an_output_is_refused(tmp_path):
    import onnx

    write_onnx(tmp_path / "full.onnx")
    model = onnx.load(tmp_path / "full.onnx")
    del model.graph.output[2]
    onnx.save(model, tmp_path / "no_cam.onnx")
    with pytest.raises(ValueError, match="lacks cam"):
        OnnxRuntimeEngine(tmp_path / "no_cam.onnx")


class _Recorder:
    def __init__(self, name):
        self.name, self.batches = name, []

    def run(self, images, with_cam=False):
        self.batches.append(len(images))

    def warm_up(self, batch):
        self.batches.append(batch)


def test_buckets_pick_the_smallest_that_holds_the_batch():
    small, large = _Recorder("small"), _Recorder("large")
    engine = BucketedEngine({8: large, 1: small})
    for count in (1, 2, 8, 9):
        engine.run(pictures(count))
    engine.warm_up(1)
    assert small.batches == [1, 1]
    assert large.batches == [2, 8, 9]


def test_a_bucketed_choice_survives_json_and_shares_sessions(bundle):
    one, two = ({"engine": "onnxruntime", "options": {"threads": n}} for n in (1, 2))
    engine = create_engine(bundle, {"buckets": {"1": one, "8": two, "32": one}})
    assert engine.engine_for(1) is engine.engine_for(20) is not engine.engine_for(8)
    np.testing.assert_allclose(engine.run(pictures(8)).logits, expected_outputs(pictures(8))[0], atol=1e-4)


def test_a_replica_that_loads_an_engine_has_no_torch_mlflow_or_lightgbm(bundle):
    code = (
        "import sys; from modeling.bundle import load_bundle; from modeling.engines import create_engine;"
        f"create_engine(load_bundle({str(bundle.directory)!r})).warm_up(1);"
        "print([m for m in ('torch', 'mlflow', 'lightgbm', 'pandas', 'ray') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
