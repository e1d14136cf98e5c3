"""OpenVINO as an engine, on CPUs: float32, bfloat16 where the processor computes in it, and int8 networks."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.engine_interface import (
    CAM,
    EMBEDDING,
    INPUT,
    LOGITS,
    EngineOutput,
    EngineUnavailableError,
    check_images,
    check_names,
)


class OpenVinoOptions(BaseModel):
    """`threads` of one run; `precision` of the arithmetic outside of quantised layers."""

    model_config = ConfigDict(extra="forbid")

    threads: int = Field(1, ge=1, le=1024)
    precision: Literal["f32", "bf16"] = "f32"


class OpenVinoEngine:
    """OpenVINO on the CPU. `run` may be called from several threads; one runs at a time.

    Raises:
        EngineUnavailableError: OpenVINO is not installed, or this processor does not compute in bfloat16.
        ValueError: the file is not a usable ONNX model.
    """

    def __init__(self, onnx_path: str | Path, threads: int = 1, precision: str = "f32"):
        self.name = f"openvino-{precision}-{threads}"
        core = _core(self.name)
        if precision == "bf16" and not computes_bfloat16():
            raise EngineUnavailableError(f"engine {self.name}: this processor has no bfloat16 arithmetic")
        settings = {
            # Left alone, OpenVINO computes in bfloat16 wherever the processor can.
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Pinned threads of two replicas on one host would share the first cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = core.read_model(str(onnx_path))
            names = [[sorted(port.names) for port in ports] for ports in (model.inputs, model.outputs)]
            check_names(self.name, onnx_path, *(sum(found, []) for found in names))
            self.input_size = int(model.input(INPUT).get_partial_shape()[1].get_length())
            self._model = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise ValueError(
                f"engine {self.name}: {onnx_path} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        self._request = self._model.create_infer_request()
        self._lock = threading.Lock()

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        images = check_images(images, self.input_size)
        outputs = (LOGITS, EMBEDDING, CAM) if with_cam else (LOGITS, EMBEDDING)
        with self._lock:
            self._request.infer({INPUT: images}, share_inputs=True)
            # The tensors belong to the request, which the next call overwrites.
            return EngineOutput(*(self._request.get_tensor(name).data.copy() for name in outputs))

    def warm_up(self, batch: int) -> None:
        self.run(np.zeros((batch, self.input_size, self.input_size, 3), np.uint8))


def _core(engine: str) -> Any:
    try:
        return _process_core()
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            f"engine {engine}: OpenVINO is not installed (pip install dermray[openvino])"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineUnavailableError(
            f"engine {engine}: OpenVINO does not start: {' '.join(str(error).split())}"
        ) from error


@functools.cache
def _process_core() -> Any:
    """One for the process, for as long as it lives. The CPU plugin of each `Core` gives the thread that loads it a
    stack for signal handlers and takes it away when it goes: of two, the second to go leaves the thread with the first
    one's stack, which is unmapped, and the next Ctrl-C ends in a segmentation fault (OpenVINO 2026.4)."""
    import openvino

    return openvino.Core()


def computes_bfloat16() -> bool:
    """Whether OpenVINO finds bfloat16 arithmetic in this processor; elsewhere it would convert back and forth.

    Raises:
        EngineUnavailableError: OpenVINO is not installed.
    """
    return "BF16" in _core("openvino-bf16").get_property("CPU", "OPTIMIZATION_CAPABILITIES")
