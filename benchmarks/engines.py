"""Every engine of a trained model beside torch, in one alternating run, and beside what the machine could do.

python -m benchmarks.engines --run RUN --dataset DATASET --bundle BUNDLE [--engine-set FILE] [--compile] [--rounds 7]

RUN is the folder that train_model wrote (torch's weights), BUNDLE the bundle it made, FILE an engine set that
export_engine wrote; without one, the float32 engines are timed. On a GPU torch runs there too: float32, and float16 in
a CUDA graph. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipelines.image_dataset import open_dataset
from modeling.bundle import Bundle, load_bundle
from modeling.engine_candidates import candidates_for
from modeling.engine_interface import Engine, EngineOutput
from modeling.engine_selection import BUCKETS, time_engines
from modeling.engine_set import EngineSet
from modeling.engines import create_engine
from modeling.image_scorer import ExportableScorer
from modeling.recorded_answers import softmax
from training.networks import load_network
from training.run_folder import network_name, read_identity, read_network

_COPY_FLOATS, _MATMUL_SIDE = 32 * 2**20, 1536


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


def work_of(scorer: nn.Module, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Floating-point operations per picture, and the bytes that its convolutions and linear layers read and write at
    batch 1, weights included: 4 bytes a number, nothing kept in caches."""
    from torch.utils.flop_counter import FlopCounterMode

    moved = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved
        moved += 4 * (inputs[0].numel() + output.numel() + sum(weight.numel() for weight in module.parameters()))

    layers = [module for module in scorer.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        scorer(torch.zeros((1, *shape), dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), float(moved)


def machine_rates(device: str, threads: int) -> tuple[float, float]:
    """Measured floating-point operations a second of a float32 matrix product, and bytes a second of a copy (read and
    written): best of seven."""
    torch.set_num_threads(threads)
    source = torch.ones(_COPY_FLOATS, device=device)
    target = torch.empty_like(source)
    left = torch.ones((_MATMUL_SIDE, _MATMUL_SIDE), device=device)

    def best(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(7):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return min(taken)

    return 2 * _MATMUL_SIDE**3 / best(lambda: left @ left), 8 * _COPY_FLOATS / best(lambda: target.copy_(source))


def chosen_engines(bundle: Bundle, engine_set: Path | None) -> dict[str, Engine]:
    """The engines of a set that passed, or the float32 ones that start here."""
    if engine_set is None:
        candidates = candidates_for(None, BUCKETS)
    else:
        reports = EngineSet.model_validate_json(engine_set.read_bytes()).candidates
        candidates = [report.candidate for report in reports if report.passed]
    found = {}
    for candidate in candidates:
        try:
            found[candidate.name] = create_engine(bundle, candidate.choice)
        except ValueError as error:
            print(f"{candidate.name} is left out: {error}", file=sys.stderr)
    return found


def torch_engines(scorer: ExportableScorer, shape: tuple[int, int, int], compiled: bool) -> dict[str, Engine]:
    """torch eager with one and two threads and, where asked for, compiled; on a GPU the GPU's."""
    found: dict[str, Engine] = {}

    def add(name: str, module: nn.Module, threads: int, device: str = "cpu") -> None:
        found[name] = TorchEngine(module, name, shape, threads, device)

    if torch.cuda.is_available():
        there = scorer.to("cuda")
        add("torch-cuda-fp32", there, 1, "cuda")
        found["torch-cuda-graph-fp16"] = GraphedTorchEngine(in_float16(there), "torch-cuda-graph-fp16", shape)
        return found
    for threads in (1, 2):
        add(f"torch-eager-{threads}", scorer, threads)
    if compiled:
        add("torch-compile-2", torch.compile(scorer, dynamic=False), 2)
        add("torch-aoti-2", ahead_of_time(scorer, shape), 2)
    return found


def ahead_of_time(scorer: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The network compiled by AOTInductor, which leaves a shared library that needs no Python to run."""
    import torch._inductor

    batch = torch.export.Dim("batch", min=1, max=max(BUCKETS))
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    with torch.no_grad():
        exported = torch.export.export(scorer, (example,), dynamic_shapes={"images": {0: batch}})
        package = torch._inductor.aoti_compile_and_package(exported)
    return torch._inductor.aoti_load_package(package)


def report(
    timings: dict[str, dict[int, float]],
    differences: dict[str, float],
    work: tuple[float, float],
    rates: dict[int, tuple[float, float]],
    baseline: str,
) -> str:
    """The table: milliseconds per image, how much faster than the baseline, largest difference of a probability."""
    lines = [
        "| engine | " + " | ".join(f"ms/image at {bucket}" for bucket in BUCKETS) + " | "
        "" + " | ".join(f"x {baseline} at {bucket}" for bucket in BUCKETS) + " | max abs Δp |",
        "|" + "---|" * (2 + 2 * len(BUCKETS)),
    ]
    for name, by_bucket in sorted(timings.items(), key=lambda item: item[1][1]):
        ratios = [timings[baseline][bucket] / by_bucket[bucket] for bucket in BUCKETS]
        figures = [f"{by_bucket[bucket]:.2f}" for bucket in BUCKETS] + [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {name} | {' | '.join(figures)} | {differences[name]:.1e} |")
    flops, moved = work
    for threads, (flop_rate, copy_rate) in rates.items():
        bounds = [1000 * flops / flop_rate, 1000 * moved / copy_rate]
        lines.append(
            f"\n{threads} thread(s): {flops / 1e9:.2f} GFLOP and {moved / 1e6:.0f} MB an image; measured "
            f"{flop_rate / 1e9:.0f} GFLOP/s and {copy_rate / 1e9:.1f} GB/s: at least {bounds[0]:.2f} ms of arithmetic, "
            f"{bounds[1]:.2f} ms of traffic were nothing cached."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--engine-set", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    size = bundle.manifest.input_size
    shape = (size, size, 3)
    scorer = torch_scorer(arguments.run, arguments.dataset, bundle)
    work = work_of(scorer, shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {threads: machine_rates(device, threads) for threads in ((1,) if device == "cuda" else (1, 2))}
    engines = torch_engines(scorer, shape, arguments.compile) | chosen_engines(bundle, arguments.engine_set)
    reference = bundle.parity()
    expected = softmax(reference["logits"].astype(np.float64))
    differences = {
        name: float(np.abs(softmax(engine.run(reference["images"]).logits.astype(np.float64)) - expected).max())
        for name, engine in engines.items()
    }
    timings = time_engines(
        engines, reference["images"], rounds=arguments.rounds, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    baseline = "torch-cuda-fp32" if device == "cuda" else "torch-eager-2"
    print(report(timings, differences, work, rates, baseline))


if __name__ == "__main__":
    main()
