"""The networks of a trained model in torch, as engines to compare others with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipelines.image_dataset import open_dataset
from modeling.bundle import Bundle
from modeling.engine_interface import Engine, EngineOutput
from modeling.engine_set import num_cores
from modeling.engine_timing import BUCKETS
from modeling.image_scorer import ExportableScorer
from training.networks import load_network
from training.run_folder import network_name, read_identity, read_network


class TorchEngine:
    """The network in torch, as an engine: `threads` on the CPU, or on the GPU."""

    def __init__(self, scorer: nn.Module, name: str, shape: tuple[int, int, int], threads: int, device: str = "cpu"):
        self.name, self._scorer, self._shape, self._threads, self._device = name, scorer, shape, threads, device

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            outputs = self._scorer(torch.from_numpy(images).to(self._device))
        logits, embedding, cam = (output.float().cpu().numpy() for output in outputs)
        return EngineOutput(logits, embedding, cam if with_cam else None)

    def warm_up(self, batch: int) -> None:
        self.run(np.zeros((batch, *self._shape), np.uint8))


class GraphedTorchEngine:
    """The network in torch as one CUDA graph per batch size."""

    def __init__(self, scorer: nn.Module, name: str, shape: tuple[int, int, int]):
        self.name, self._scorer, self._shape = name, scorer, shape
        self._graphs: dict[int, tuple[Any, torch.Tensor, tuple[torch.Tensor, ...]]] = {}

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        graph, inputs, outputs = self._graphs.get(len(images)) or self._capture(len(images))
        inputs.copy_(torch.from_numpy(images), non_blocking=True)
        graph.replay()
        logits, embedding, cam = (output.float().cpu().numpy() for output in outputs)
        return EngineOutput(logits, embedding, cam if with_cam else None)

    def warm_up(self, batch: int) -> None:
        self.run(np.zeros((batch, *self._shape), np.uint8))

    def _capture(self, batch: int):
        inputs = torch.zeros((batch, *self._shape), dtype=torch.uint8, device="cuda")

        def forward():
            with torch.inference_mode():
                return self._scorer(inputs)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = forward()
        self._graphs[batch] = (graph, inputs, outputs)
        return self._graphs[batch]


def in_float16(scorer: ExportableScorer) -> ExportableScorer:
    """A copy with float16 weights. Pixels are normalised in float32 and then rounded."""
    copied = copy.deepcopy(scorer).half()
    for network in copied.scorers:
        network.scale, network.shift = network.scale.float(), network.shift.float()
        normalise = network.normalise
        network.normalise = lambda images, normalise=normalise: normalise(images).half()
    return copied


def torch_scorer(run: Path, dataset: str, bundle: Bundle) -> ExportableScorer:
    """The networks that the bundle's graph was exported from, on the CPU in evaluation mode.

    Raises:
        ValueError: a network of the run is gone.
    """
    config, digest = read_identity(run)
    version = open_dataset(dataset)
    if version.digest != digest or bundle.manifest.dataset_digest != digest:
        raise ValueError(f"run {run} was trained on data set {digest}; data set or bundle is another one's")
    ensemble = bundle.manifest.training["build"]["ensemble"]
    folds: list[int | None] = [None, *version.training_folds] if ensemble else [None]
    networks = []
    for fold in folds:
        found = read_network(run, network_name(fold))
        if found is None:
            raise ValueError(f"run {run} has no network {network_name(fold)} any more")
        networks.append(load_network(Path(found["checkpoint"]), config, version.task))
    return ExportableScorer(networks, config.model.num_views).eval()


def ahead_of_time(scorer: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The network compiled by AOTInductor, which leaves a shared library that needs no Python to run."""
    import torch._inductor

    batch = torch.export.Dim("batch", min=1, max=max(BUCKETS))
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    with torch.no_grad():
        exported = torch.export.export(scorer, (example,), dynamic_shapes={"images": {0: batch}})
        package = torch._inductor.aoti_compile_and_package(exported)
    return torch._inductor.aoti_load_package(package)


def torch_engines(scorer: ExportableScorer, shape: tuple[int, int, int], compiled: bool) -> dict[str, list[Engine]]:
    """torch eager with one and two threads and, where asked for, compiled, each as often as it fits on the cores; on a
    GPU the GPU's float32, and float16 in a CUDA graph."""
    if torch.cuda.is_available():
        there = scorer.to("cuda")
        return {
            "torch-cuda-fp32": [TorchEngine(there, "torch-cuda-fp32", shape, 1, "cuda")],
            "torch-cuda-graph-fp16": [GraphedTorchEngine(in_float16(there), "torch-cuda-graph-fp16", shape)],
        }
    modules = {"torch-eager-1": (scorer, 1), "torch-eager-2": (scorer, 2)}
    if compiled:
        modules["torch-compile-2"] = (torch.compile(scorer, dynamic=False), 2)
        modules["torch-aoti-2"] = (ahead_of_time(scorer, shape), 2)
    return {
        name: [TorchEngine(module, name, shape, threads)] * max(1, num_cores() // threads)
        for name, (module, threads) in modules.items()
    }
