"""The engines that this device can try: every runtime, thread count and precision that it has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from modeling.engine_interface import EngineUnavailableError
from modeling.engine_set import Candidate, cuda_available, num_cores
from modeling.network_file import NetworkFile
from modeling.network_precision import cpu_activations
from modeling.openvino_engine import computes_bfloat16
from modeling.tensorrt_engine import check_tensorrt

# More threads first: the first of a kind is the one that is run on all lesions.
_THREADS = (2, 1)
# Rates are measured side by side on so many cores at most: every engine there holds its own copy of the network.
_MEASURED_CORES = 8
CPU_ENGINES, GPU_ENGINES = ("onnxruntime", "openvino"), ("tensorrt",)


def unavailable_engines() -> dict[str, str]:
    """Why an engine cannot be tried here, by its name; ONNX Runtime on the CPU always can."""
    reasons = {}
    for name, check in (("openvino", computes_bfloat16), ("tensorrt", check_tensorrt)):
        try:
            check()
        except EngineUnavailableError as error:
            reasons[name] = str(error)
    return reasons


def onnxruntime_has_int8() -> bool:
    """Whether ONNX Runtime has int8 kernels for this processor: layers whose inputs take half of uint8 it computes in
    float32, in two to three times a float32 network's time (measured)."""
    return cpu_activations() == "uint8"


def int8_has_use(engines: Collection[str]) -> bool:
    """Whether one of the engines can try an int8 network here."""
    usable = set(engines) - set(unavailable_engines())
    return bool(usable - {"onnxruntime"}) or ("onnxruntime" in usable and onnxruntime_has_int8())


def float16_has_use() -> bool:
    """Whether some engine here computes in float16: on CPUs it would only be converted back and forth."""
    return cuda_available() or "tensorrt" not in unavailable_engines()


def candidates_for(
    network: NetworkFile | None, buckets: Sequence[int], engines: Collection[str] = CPU_ENGINES + GPU_ENGINES
) -> list[Candidate]:
    """Those of `engines` that this device can try with the bundle's own float32 network (None), or with one in another
    precision."""
    precision = "fp32" if network is None else network.precision
    usable, found = set(engines) - set(unavailable_engines()), []

    def add(name: str, engine: str, options: dict[str, Any], slots: int = 1, arithmetic: str = precision) -> None:
        choice: dict[str, Any] = {"engine": engine, "options": options}
        if network is not None:
            choice["network"] = network.model_dump()
        suffix = network.name if network is not None else arithmetic
        label = name if suffix == "fp32" else f"{name}-{suffix}"
        found.append(Candidate(name=label, choice=choice, precision=arithmetic, slots=slots))

    cores = min(num_cores(), _MEASURED_CORES)
    for threads in (count for count in _THREADS if count <= cores and precision != "fp16"):
        slots = cores // threads
        if "onnxruntime" in usable and (precision != "int8" or onnxruntime_has_int8()):
            add(f"onnxruntime-cpu-{threads}", "onnxruntime", {"threads": threads, "provider": "cpu"}, slots)
        if "openvino" in usable:
            add(f"openvino-{threads}", "openvino", {"threads": threads, "precision": "f32"}, slots)
            if network is None and computes_bfloat16():
                add(f"openvino-{threads}", "openvino", {"threads": threads, "precision": "bf16"}, slots, "bf16")
    if "onnxruntime" in usable and cuda_available() and precision != "int8":
        add("onnxruntime-cuda", "onnxruntime", {"threads": 1, "provider": "cuda"})
    if "tensorrt" in usable:
        add("tensorrt", "tensorrt", {"batches": sorted(buckets), "precision": precision})
    return found
