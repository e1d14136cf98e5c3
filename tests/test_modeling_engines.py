"""Engines compute the network's function, whatever the batch, and say clearly what they cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modeling import openvino_engine
from modeling.engine_interface import EngineUnavailableError
from modeling.engines import BucketedEngine, create_engine, start_engine
from modeling.network_file import keep_network
from modeling.onnxruntime_engine import OnnxRuntimeEngine
from modeling.openvino_engine import OpenVinoEngine
from tests.tiny_bundle import SIZE, expected_outputs, tiny_bundle, write_onnx


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def pictures(count):
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "choice",
    [None, {"engine": "onnxruntime", "options": {"threads": 2}}, {"engine": "openvino", "options": {"threads": 1}}],
)
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
        ({"engine": "abacus"}, "unknown engine 'abacus'; known engines: \\['onnxruntime', 'openvino', 'tensorrt'\\]"),
        ({}, "unknown engine None"),
        ({"engine": "onnxruntime", "thread": 1}, "unknown keys \\['thread'\\]"),
        ({"engine": "onnxruntime", "options": {"thread": 1}}, "option thread = 1"),
        ({"engine": "onnxruntime", "options": {"threads": 0}}, "option threads = 0"),
        ({"buckets": {"one": {"engine": "onnxruntime"}}}, "engine bucket 'one'"),
        ({"buckets": {"1": {"engine": "abacus"}}}, "unknown engine 'abacus'"),
        ({"buckets": {}}, "expected batch sizes"),
        ({"engine": "openvino", "options": {"precision": "f64"}}, "engine openvino option precision = 'f64'"),
        ({"engine": "tensorrt", "options": {"batches": []}}, "engine tensorrt option batches"),
        ({"engine": "onnxruntime", "network": {"uri": "x.onnx"}}, "engine choice: network sha256"),
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


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path, engine):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        engine(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_a_graph_without_an_output_is_refused(tmp_path, engine):
    import onnx

    write_onnx(tmp_path / "full.onnx")
    model = onnx.load(tmp_path / "full.onnx")
    del model.graph.output[2]
    onnx.save(model, tmp_path / "no_cam.onnx")
    with pytest.raises(ValueError, match="lacks cam"):
        engine(tmp_path / "no_cam.onnx")


def _missing_openvino(monkeypatch):
    # As in a process that has not loaded it yet.
    monkeypatch.setattr(openvino_engine, "_process_core", openvino_engine._process_core.__wrapped__)
    monkeypatch.setitem(sys.modules, "openvino", None)
    return {"engine": "openvino"}


def _missing_tensorrt(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    return {"engine": "tensorrt"}


@pytest.mark.parametrize(
    ("missing", "reason"), [(_missing_openvino, "OpenVINO is not"), (_missing_tensorrt, "tensorrt")]
)
def test_a_host_that_cannot_run_the_choice_serves_the_same_model_and_says_why(
    bundle, monkeypatch, caplog, missing, reason
):
    choice = missing(monkeypatch)
    with pytest.raises(EngineUnavailableError, match=reason):
        create_engine(bundle, choice)
    engine, why = start_engine(bundle, choice)
    assert reason in why and engine.name == "onnxruntime-cpu-1"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and why in caplog.text
    np.testing.assert_allclose(engine.run(pictures(3)).logits, expected_outputs(pictures(3))[0], atol=1e-4)


def test_a_choice_that_is_wrong_everywhere_is_no_reason_to_run_another_engine(bundle):
    with pytest.raises(ValueError, match="unknown engine"):
        start_engine(bundle, {"engine": "abacus"})


def test_one_engine_answers_several_threads_at_once(bundle):
    """Each caller gets its own pictures' answers, whatever the others run."""
    engine = create_engine(bundle, {"engine": "openvino", "options": {"threads": 1}})
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda count: engine.run(pictures(count)).logits, [3, 4, 5, 6] * 25))
    for count, logits in zip([3, 4, 5, 6] * 25, outputs, strict=True):
        np.testing.assert_allclose(logits, expected_outputs(pictures(count))[0], atol=1e-4)


def test_another_network_is_fetched_by_its_hash(bundle, tmp_path):
    write_onnx(tmp_path / "new.onnx", bias=0.5)
    network = keep_network(tmp_path / "new.onnx", tmp_path, "int8").model_dump()
    path = Path(network["uri"])
    engine = create_engine(bundle, {"engine": "onnxruntime", "network": network})
    assert engine.name == "onnxruntime-cpu-1-int8"
    expected = expected_outputs(pictures(2))[0] + np.array([0.0, 0.5])
    np.testing.assert_allclose(engine.run(pictures(2)).logits, expected, atol=1e-4)
    write_onnx(path, bias=0.6)
    with pytest.raises(ValueError, match="has sha256 .*, expected .*; run export_engine again"):
        create_engine(bundle, {"engine": "onnxruntime", "network": network})
    path.unlink()
    with pytest.raises(ValueError, match="onnx not found; run export_engine again"):
        create_engine(bundle, {"engine": "onnxruntime", "network": network})


def test_a_network_in_an_object_store_is_copied_once(bundle, tmp_path):
    import fsspec

    write_onnx(tmp_path / "new.onnx", bias=0.5)
    network = keep_network(tmp_path / "new.onnx", tmp_path, "int8")
    store = fsspec.filesystem("memory")
    store.pipe_file("/sets/int8.onnx", Path(network.uri).read_bytes())
    there = network.model_copy(update={"uri": "memory://sets/int8.onnx"})
    choice = {"engine": "onnxruntime", "network": there.model_dump()}
    first = create_engine(bundle, choice).run(pictures(2)).logits
    copy = store.cat_file("/sets/int8.onnx")
    store.rm("/sets/int8.onnx")
    np.testing.assert_array_equal(create_engine(bundle, choice).run(pictures(2)).logits, first)
    # A copy that was damaged is fetched again, and one that is another network never becomes the cached one.
    (cached,) = (Path(os.environ["DERMRAY_HOME"]) / "bundle_cache" / "networks").iterdir()
    cached.write_bytes(b"damaged")
    store.pipe_file("/sets/int8.onnx", b"another network")
    with pytest.raises(ValueError, match="memory://sets/int8.onnx has sha256"):
        create_engine(bundle, choice)
    store.pipe_file("/sets/int8.onnx", copy)
    np.testing.assert_array_equal(create_engine(bundle, choice).run(pictures(2)).logits, first)


def test_a_host_that_computes_another_function_with_the_choice_runs_the_default(bundle, tmp_path):
    """As AVX2 does with 8-bit weights that were chosen on a processor with VNNI."""
    write_onnx(tmp_path / "new.onnx", bias=0.5)
    network = keep_network(tmp_path / "new.onnx", tmp_path, "int8")
    choice = {"engine": "onnxruntime", "network": network.model_dump(), "max_delta_p": 0.004}
    engine, why = start_engine(bundle, choice, [1, 4])
    assert engine.name == "onnxruntime-cpu-1" and "off torch's on this machine in batches of 1" in why
    near = {**choice, "max_delta_p": 0.2}
    assert start_engine(bundle, near, [1, 4])[0].name == "onnxruntime-cpu-1-int8"
    assert start_engine(bundle, {"buckets": {"1": near, "4": near}}, [1, 4])[1] is None


def test_a_host_whose_engine_overflows_runs_the_default(bundle, tmp_path):
    """As float16 may on another GPU."""
    write_onnx(tmp_path / "new.onnx", bias=float("inf"))
    network = keep_network(tmp_path / "new.onnx", tmp_path, "fp16").model_dump()
    engine, why = start_engine(bundle, {"engine": "onnxruntime", "network": network, "max_delta_p": 0.5})
    assert engine.name == "onnxruntime-cpu-1" and "logits holds values that are not finite" in why


def test_a_bundle_whose_network_is_not_torchs_is_not_served(tmp_path):
    wrong = tiny_bundle(tmp_path / "wrong", onnx_bias=0.5)
    with pytest.raises(ValueError, match="off torch's"):
        start_engine(wrong)


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


def test_ctrl_c_after_engines_came_and_went_is_an_interrupt(bundle):
    """Each plugin of OpenVINO changes the signal stack of its thread: a job was ended by a segmentation fault."""
    code = (
        "import gc, os, signal; from modeling.bundle import load_bundle; from modeling.engines import create_engine\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"bundle = load_bundle({str(bundle.directory)!r})\n"
        "load = lambda threads: create_engine(bundle, {'engine': 'openvino', 'options': {'threads': threads}})\n"
        "first, second = load(1), load(2)\n"
        "del first; gc.collect()\n"
        "del second; gc.collect()\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


def test_a_bucketed_choice_survives_json_and_shares_sessions(bundle):
    one, two = ({"engine": "onnxruntime", "options": {"threads": n}} for n in (1, 2))
    engine = create_engine(bundle, {"buckets": {"1": one, "8": two, "32": one}})
    assert engine.engine_for(1) is engine.engine_for(20) is not engine.engine_for(8)
    np.testing.assert_allclose(engine.run(pictures(8)).logits, expected_outputs(pictures(8))[0], atol=1e-4)


def test_a_replica_that_loads_an_engine_has_no_torch_mlflow_or_lightgbm(bundle):
    code = (
        "import sys; from modeling.bundle import load_bundle; from modeling.engines import create_engine;"
        f"create_engine(load_bundle({str(bundle.directory)!r})).warm_up(1);"
        "print([m for m in ('torch', 'mlflow', 'lightgbm', 'pandas', 'ray', 'openvino', 'scipy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
