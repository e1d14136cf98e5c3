"""The comparison of engines has the agreed keys, and its ratios are those of its rows."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import engines
from benchmarks.student import OwnPictures
from modeling.engine_candidates import candidates_for
from modeling.engine_selection import measure_candidates
from modeling.engine_set import Candidate
from modeling.engines import create_engine
from tests.tiny_bundle import SIZE, tiny_bundle

ONE = [1]


@pytest.fixture(scope="module", autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Tiny(nn.Module):
    """Some network on pictures of the tiny bundle's size; what it answers does not matter to timings."""

    def __init__(self):
        super().__init__()
        self.mixing, self.head = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        features = self.mixing(images.float().permute(0, 3, 1, 2) / 255)
        cam = self.head(features)
        return cam.mean(dim=(2, 3)), features.mean(dim=(2, 3)), cam


def one_student(run, version, bundle, folder):
    facts = {"precision": "int8", "max_delta_p": None, "delta_auc": -0.01, "delta_pauc": -0.002, "verdict": "another"}
    return {"openvino-1-int8": [OwnPictures(create_engine(bundle), bundle.parity()["images"])]}, {
        "openvino-1-int8": facts
    }


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    bundle = tiny_bundle(folder / "tiny")
    candidates = [*candidates_for(None, ONE), Candidate(name="abacus", choice={"engine": "abacus"})]
    engine_set = measure_candidates(bundle, candidates, buckets=(1, 8), rounds=1).save(folder / "sets")
    arguments = Namespace(
        run=folder,
        dataset="",
        bundle=bundle.directory,
        engine_set=engine_set,
        student=folder,
        compile=False,
        batches=[1, 8],
        rounds=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "torch_scorer", lambda run, dataset, bundle: Tiny().eval())
        patch.setattr("benchmarks.engines._COPY_FLOATS", 2**16)
        patch.setattr("benchmarks.engines._MATMUL_SIDE", 64)
        patch.setattr(engines, "open_dataset", lambda dataset: None)
        patch.setattr(engines, "student_engines", one_student)
        return json.loads(json.dumps(engines.measure(arguments, folder)))


def test_the_result_has_the_agreed_keys(result):
    assert {"device", "chosen", "rows", "speedup_b1", "speedup_b8"} <= set(result)
    for row in result["rows"]:
        assert {"candidate", "precision", "batch", "ms_per_image", "delta_pauc", "verdict"} <= set(row)
    names = {row["candidate"] for row in result["rows"]}
    assert {"torch-eager-1", "torch-eager-2", "onnxruntime-cpu-1", "abacus"} <= names
    assert "student openvino-1-int8" in names


def test_speedups_are_the_chosen_engines_rate_over_the_best_of_torch_eager(result):
    rates = {(row["candidate"], row["batch"]): row["images_per_second"] for row in result["rows"]}
    for batch in (1, 8):
        eager = max(rates["torch-eager-1", batch], rates["torch-eager-2", batch])
        assert result[f"speedup_b{batch}"] == pytest.approx(rates[result["chosen"][str(batch)], batch] / eager)


def test_a_refused_candidate_is_in_the_rows_without_times(result):
    (first, second) = [row for row in result["rows"] if row["candidate"] == "abacus"]
    assert first["verdict"].startswith("refused: ") and first["ms_per_image"] is second["ms_per_image"] is None


def test_the_work_of_a_network_is_what_its_layers_compute_and_move():
    flops, moved = engines.work_of(Tiny(), (SIZE, SIZE, 3))
    pixels = SIZE * SIZE
    assert flops == 2 * pixels * (3 * 8 + 8 * 2)
    assert moved == 4 * (pixels * (3 + 8) + 3 * 8 + pixels * (8 + 2) + 8 * 2 + 2)


def test_the_machines_rates_are_positive_and_sane():
    flop_rate, copy_rate = engines.machine_rates("cpu", 1)
    assert 1e8 < flop_rate < 1e15 and 1e8 < copy_rate < 1e14


@pytest.mark.parametrize("text", ["", "1,7", "one"])
def test_batch_sizes_are_those_that_engine_sets_have(text):
    with pytest.raises(ValueError):
        engines.sizes(text)
    assert np.array_equal(engines.sizes("1,32"), [1, 32])
