"""Every engine of a trained model beside torch, in one alternating run, and beside what the machine could do.

    python -m benchmarks.engines --run RUN --dataset DATASET --bundle BUNDLE --engine-set FILE [--compile]
        [--student STUDENT_RUN] [--batches 1,8,32] [--rounds 7]

RUN is the folder that train_model wrote (torch's weights), BUNDLE the bundle it made, FILE the engine set that
export_engine wrote; the engines that passed are timed. The refit of STUDENT_RUN, which learnt from RUN, is timed in
float32 and int8; its ΔAUC and ΔpAUC are from the bundle's network in float32. On a GPU torch runs there: float32, and
float16 in a CUDA graph. A table goes to stderr, one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.student import student_engines
from benchmarks.torch_engines import torch_engines, torch_scorer
from data_pipelines.image_dataset import open_dataset
from modeling.bundle import Bundle, load_bundle
from modeling.engine_interface import Engine
from modeling.engine_set import CandidateReport, EngineSet, device_key
from modeling.engine_timing import BUCKETS, Timing, time_engines
from modeling.engines import create_engine
from modeling.recorded_answers import softmax

_COPY_FLOATS, _MATMUL_SIDE = 32 * 2**20, 1536
STUDENT = "student "


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


def set_engines(bundle: Bundle, reports: list[CandidateReport]) -> dict[str, list[Engine]]:
    """Of each candidate as many engines as fit beside each other."""
    return {
        report.candidate.name: [create_engine(bundle, report.candidate.choice) for _ in range(report.candidate.slots)]
        for report in reports
    }


def row(name: str, bucket: int, timing: Timing | None, facts: dict[str, Any]) -> dict[str, Any]:
    """One row of the result: an engine at a batch size."""
    times = {"ms_per_image": None, "images_per_second": None}
    if timing is not None:
        times = {"ms_per_image": timing.ms_per_image, "images_per_second": timing.images_per_second}
    return {"candidate": name, "batch": bucket, **times, **facts}


def facts_of(report: CandidateReport) -> dict[str, Any]:
    """What the engine set says of a candidate."""
    lesions = report.lesions
    return {
        "precision": report.candidate.precision,
        "max_delta_p": lesions.probability if lesions else report.parity.probability if report.parity else None,
        "delta_auc": lesions.delta_auc if lesions else None,
        "delta_pauc": lesions.delta_pauc if lesions else None,
        "verdict": "passed" if report.passed else f"refused: {report.reason}",
    }


def table(rows: list[dict[str, Any]], baselines: dict[int, str]) -> str:
    """The rows as Markdown, engines in the order of their rate; each ratio is to the baseline of the batch size."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in rows:
        by_name.setdefault(entry["candidate"], {})[entry["batch"]] = entry
    rates = {bucket: by_name[name][bucket]["images_per_second"] for bucket, name in baselines.items()}
    columns = [f"ms/image at {bucket}" for bucket in baselines] + [f"images/s at {bucket}" for bucket in baselines]
    first = min(baselines)
    lines = [
        "| engine | " + " | ".join(columns) + " | x torch eager | max abs Δp | ΔAUC | ΔpAUC |",
        "|---" * (5 + len(columns)) + "|",
    ]
    timed = {name: found for name, found in by_name.items() if found[first]["images_per_second"] is not None}
    for name, found in sorted(timed.items(), key=lambda item: item[1][first]["images_per_second"]):
        figures = [f"{found[bucket]['ms_per_image']:.2f}" for bucket in baselines]
        figures += [f"{found[bucket]['images_per_second']:.1f}" for bucket in baselines]
        figures.append(", ".join(f"{found[b]['images_per_second'] / rates[b]:.2f}" for b in baselines))
        for key, form in (("max_delta_p", ".1e"), ("delta_auc", "+.4f"), ("delta_pauc", "+.4f")):
            value = found[first].get(key)
            figures.append("" if value is None else format(value, form))
        lines.append(f"| {name} | {' | '.join(figures)} |")
    for name, found in by_name.items():
        if name not in timed:
            lines.append(f"\n{name}: {next(iter(found.values()))['verdict']}")
    return "\n".join(lines)


def roofline(scorer: nn.Module, shape: tuple[int, int, int], device: str) -> list[dict[str, float]]:
    """What one picture costs at least, by number of threads: arithmetic at the rate of a matrix product, traffic at the
    rate of a copy."""
    flops, moved = work_of(scorer, shape)
    found = []
    for threads in (1,) if device == "cuda" else (1, 2):
        flop_rate, copy_rate = machine_rates(device, threads)
        facts = {"threads": threads, "gflop": flops / 1e9, "mb": moved / 1e6}
        rates = {"gflop_per_second": flop_rate / 1e9, "gb_per_second": copy_rate / 1e9}
        bounds = {"arithmetic_ms": 1000 * flops / flop_rate, "traffic_ms": 1000 * moved / copy_rate}
        found.append(facts | rates | bounds)
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole comparison; see the module. The student's networks are written to `folder`."""
    bundle = load_bundle(arguments.bundle)
    engine_set = EngineSet.model_validate_json(arguments.engine_set.read_bytes())
    if (engine_set.bundle_digest, engine_set.device) != (bundle.digest, device_key()) or not engine_set.chosen:
        raise ValueError(f"engine set {arguments.engine_set} is another bundle's or device's, or no engine passed")
    shape = (bundle.manifest.input_size, bundle.manifest.input_size, 3)
    scorer = torch_scorer(arguments.run, arguments.dataset, bundle)
    device, batches = "cuda" if torch.cuda.is_available() else "cpu", arguments.batches
    bounds = roofline(scorer, shape, device)
    passed = [report for report in engine_set.candidates if report.passed]
    torches = torch_engines(scorer, shape, arguments.compile)
    engines = torches | set_engines(bundle, passed)
    facts = {report.candidate.name: facts_of(report) for report in engine_set.candidates}
    if arguments.student:
        small, known = student_engines(arguments.student, open_dataset(arguments.dataset), bundle, folder)
        engines |= {STUDENT + name: found for name, found in small.items()}
        facts |= {STUDENT + name: found for name, found in known.items()}
    reference = bundle.parity()
    expected = softmax(reference["logits"].astype(np.float64))
    for name, (first, *_) in torches.items():
        found = softmax(first.run(reference["images"]).logits.astype(np.float64))
        precision = "fp16" if "fp16" in name else "fp32"
        facts[name] = {
            "precision": precision,
            "max_delta_p": float(np.abs(found - expected).max()),
            "delta_auc": None,
            "delta_pauc": None,
            "verdict": "torch",
        }
    timings = time_engines(engines, reference["images"], batches, arguments.rounds, say)
    rows = [row(name, bucket, timings.get(name, {}).get(bucket), facts[name]) for name in facts for bucket in batches]
    eager = [name for name in torches if "eager" in name or name == "torch-cuda-fp32"]
    rates = {
        name: {bucket: timing.images_per_second for bucket, timing in found.items()} for name, found in timings.items()
    }
    baselines = {bucket: max(eager, key=lambda name: rates[name][bucket]) for bucket in batches}
    ratio = {bucket: rates[engine_set.chosen[bucket]][bucket] / rates[baselines[bucket]][bucket] for bucket in batches}
    say(table(rows, baselines))
    return {
        "device": engine_set.device,
        "chosen": engine_set.chosen,
        "baseline": baselines,
        **{f"speedup_b{bucket}": value for bucket, value in ratio.items()},
        "rows": rows,
        "roofline": bounds,
    }


def sizes(text: str) -> list[int]:
    """The batch sizes of a flag; ValueError for one that engine sets do not have."""
    found = [int(part) for part in text.split(",")]
    if not found or not set(found) <= set(BUCKETS):
        raise ValueError(text)
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train_model wrote")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--engine-set", type=Path, required=True, help="JSON file that export_engine wrote")
    parser.add_argument("--student", type=Path, help="folder of a run of train_model that learnt from this one")
    parser.add_argument("--compile", action="store_true", help="torch.compile and AOTInductor, too (minutes)")
    parser.add_argument("--batches", type=sizes, default=list(BUCKETS), help="batch sizes, of those in the set: 1,8,32")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dermray-engines-") as folder:
        print(json.dumps(measure(arguments, Path(folder))))


if __name__ == "__main__":
    main()
