"""TensorRT engines: real ones are built here, without a GPU; running one needs a GPU. A cached engine is used only for
what it was built for, and never crashed on."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from modeling.engine_interface import EngineUnavailableError
from modeling.network_precision import Int8Recipe, write_float16, write_int8
from modeling.tensorrt_build import BatchProfile, EngineKey, build_plan, cached_plan, tensorrt_module
from tests.tiny_bundle import SIZE, expected_outputs, write_onnx

# One GPU generation that every TensorRT-RTX builds for; none need be here.
ADA = "8.9"
PROFILE = BatchProfile(minimum=1, optimum=8, maximum=32)
FAMILIES = {
    "tf_efficientnet_lite0": 64,
    "mobilenetv3_small_050": 64,
    "resnet18": 64,
    "torchvision/densenet121": 64,
    "vgg11_bn": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 64,
}


def key(**changes):
    facts = {
        "onnx_sha256": "a" * 64,
        "library": "tensorrt 10.16.1",
        "gpu": "NVIDIA L4",
        "compute_capability": ADA,
        "driver": "580.1",
        "profile": PROFILE,
        "precision": "fp16",
    }
    return EngineKey(**(facts | changes))


class Builder:
    """Counts its builds; each gives other bytes, and lets the other threads run."""

    def __init__(self):
        self.number = 0

    def __call__(self):
        number = self.number + 1
        for _ in range(1000):
            os.sched_yield()
        self.number = number
        return f"plan {number}".encode()


def accept(plan):
    return True


def test_a_plan_is_built_once_for_one_key(tmp_path):
    build = Builder()
    assert cached_plan(tmp_path, key(), build, accept) == cached_plan(tmp_path, key(), build, accept) == b"plan 1"


@pytest.mark.parametrize(
    "change",
    [
        {"onnx_sha256": "b" * 64},
        {"library": "tensorrt 11.0.0"},
        {"gpu": "NVIDIA H100"},
        {"compute_capability": "9.0"},
        {"driver": "590.2"},
        {"profile": BatchProfile(minimum=1, optimum=8, maximum=64)},
        {"precision": "int8"},
    ],
)
def test_whatever_a_plan_depends_on_makes_another_one(tmp_path, change):
    build = Builder()
    cached_plan(tmp_path, key(), build, accept)
    assert cached_plan(tmp_path, key(**change), build, accept) == b"plan 2"
    assert cached_plan(tmp_path, key(), build, accept) == b"plan 1"


def _truncated(plan, facts):
    plan.write_bytes(plan.read_bytes()[:3])


def _foreign(plan, facts):
    """The whole pair of another GPU, copied over this one's name."""
    other = key(gpu="NVIDIA H100")
    cached_plan(plan.parent, other, lambda: b"foreign", accept)
    for own in (plan, facts):
        own.write_bytes((plan.parent / f"{other.digest}{own.suffix}").read_bytes())


def _no_json(plan, facts):
    facts.write_text("{")


def _no_object(plan, facts):
    facts.write_text("[]")


def _no_plan(plan, facts):
    plan.unlink()


@pytest.mark.parametrize("spoil", [_truncated, _foreign, _no_json, _no_object, _no_plan])
def test_a_damaged_or_foreign_plan_is_built_again(tmp_path, spoil):
    build = Builder()
    cached_plan(tmp_path, key(), build, accept)
    spoil(tmp_path / f"{key().digest}.plan", tmp_path / f"{key().digest}.json")
    assert cached_plan(tmp_path, key(), build, accept) == b"plan 2"
    assert cached_plan(tmp_path, key(), build, accept) == b"plan 2"


def test_a_plan_that_the_runtime_refuses_is_built_again(tmp_path):
    build = Builder()
    cached_plan(tmp_path, key(), build, accept)
    assert cached_plan(tmp_path, key(), build, lambda plan: plan != b"plan 1") == b"plan 2"


def test_replicas_that_start_together_build_one_plan(tmp_path):
    build = Builder()
    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(lambda _: cached_plan(tmp_path, key(), build, accept), range(8)))
    assert set(plans) == {b"plan 1"}


def test_a_cache_that_cannot_be_written_to_costs_a_build_each_time(tmp_path):
    build = Builder()
    (tmp_path / "file").write_text("in the way")
    assert cached_plan(tmp_path / "file", key(), build, accept) == b"plan 1"
    assert cached_plan(tmp_path / "file", key(), build, accept) == b"plan 2"


def test_without_a_package_the_reason_says_what_to_install(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineUnavailableError, match="dermray\\[tensorrt"):
        tensorrt_module()


def test_a_profile_ascends():
    with pytest.raises(ValueError, match="expected ascending sizes"):
        BatchProfile(minimum=1, optimum=64, maximum=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "fp32.onnx"
    write_onnx(path)
    return path


@pytest.mark.slow
def test_an_operator_that_tensorrt_lacks_is_named(tiny, tmp_path):
    import onnx

    model = onnx.load(tiny)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Abacus", "dermray"
    model.opset_import.append(onnx.helper.make_opsetid("dermray", 1))
    onnx.save(model, tmp_path / "abacus.onnx")
    with pytest.raises(ValueError, match="abacus.onnx cannot be parsed: .*Abacus"):
        build_plan(tmp_path / "abacus.onnx", PROFILE, ADA)


@pytest.mark.slow
def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="broken.onnx (cannot be parsed|lacks)"):
        build_plan(tmp_path / "broken.onnx", PROFILE, ADA)


@pytest.mark.slow
def test_a_gpu_that_the_library_does_not_build_for_is_named(tiny):
    with pytest.raises(EngineUnavailableError, match="does not build for SM61"):
        build_plan(tiny, PROFILE, "6.1")


@pytest.mark.slow
def test_damaged_timings_do_not_stop_a_build(tiny, tmp_path):
    (tmp_path / "timings.bin").write_bytes(b"damaged")
    assert build_plan(tiny, PROFILE, ADA, tmp_path / "timings.bin")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_family_builds_in_three_precisions(family, tmp_path):
    from modeling.image_scorer import ExportableScorer, create_scorer
    from modeling.onnx_export import export_onnx

    size = FAMILIES[family]
    scorer = ExportableScorer([create_scorer(family, 2, "none", input_size=size)], num_views=2)
    paths = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "fp16", "int8")}
    export_onnx(scorer, size, paths["fp32"])
    write_float16(paths["fp32"], paths["fp16"])
    pictures = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    write_int8(paths["fp32"], paths["int8"], pictures, Int8Recipe(), "int8")
    plans = {name: len(build_plan(path, PROFILE, ADA)) for name, path in paths.items()}
    files = {name: path.stat().st_size for name, path in paths.items()}
    # A plan holds the weights, in the file's own precision, and kernels; those for int8 are large.
    assert plans["fp32"] > 0.9 * files["fp32"] and plans["int8"] > 0.9 * files["int8"]
    assert plans["fp32"] - plans["fp16"] > 0.5 * (files["fp32"] - files["fp16"])


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 1e-2), ("int8", 0.1)])
def test_an_engine_on_the_gpu_computes_the_network(tmp_path, precision, tolerance, cuda_graphs):
    from modeling.tensorrt_engine import TensorRtEngine

    pictures = np.random.default_rng(9).integers(0, 256, (16, SIZE, SIZE, 3), dtype=np.uint8)
    fp32, path = tmp_path / "fp32.onnx", tmp_path / f"{precision}.onnx"
    write_onnx(fp32)
    if precision == "fp16":
        write_float16(fp32, path)
    elif precision == "int8":
        write_int8(fp32, path, pictures, Int8Recipe(), "int8")
    engine = TensorRtEngine(path, [1, 4], precision, cuda_graphs, tmp_path / "cache")
    for count in (1, 3, 4, 11):
        images = np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
        output = engine.run(images, with_cam=True)
        logits, embedding = expected_outputs(images)
        np.testing.assert_allclose(output.logits, logits, atol=tolerance)
        np.testing.assert_allclose(output.embedding, embedding, atol=tolerance)
        np.testing.assert_allclose(output.cam.mean(axis=(2, 3)), output.logits, atol=tolerance)
