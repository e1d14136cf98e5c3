"""ONNX Runtime as an engine: any CPU, and NVIDIA GPUs where the installed package has the CUDA provider."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeOptions(BaseModel):
    """`threads` of one run (CPU); `provider` cpu or cuda."""

    model_config = ConfigDict(extra="forbid")

    threads: int = Field(1, ge=1, le=1024)
    provider: Literal["cpu", "cuda"] = "cpu"


class OnnxRuntimeEngine:
    """ONNX Runtime on CPU or CUDA. `run` may be called from several threads.

    Raises:
        EngineUnavailableError: the provider is not there, or fails to start.
        ValueError: the file is not a usable ONNX model.
    """

    def __init__(self, onnx_path: str | Path, threads: int = 1, provider: str = "cpu"):
        import onnxruntime

        self.name = f"onnxruntime-{provider}-{threads}" if provider == "cpu" else f"onnxruntime-{provider}"
        wanted = _PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise EngineUnavailableError(f"engine {self.name}: this onnxruntime has no {wanted}")
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Idle threads that spin take the cores from the other replicas.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(onnx_path), options, providers=[wanted])
        except Exception as error:  # onnxruntime raises its own classes, without a common base
            kind = EngineUnavailableError if _short_of_memory(error) else ValueError
            raise kind(f"engine {self.name}: {onnx_path} cannot be loaded: {' '.join(str(error).split())}") from error
        # A CUDA provider whose libraries are missing is replaced by the CPU with no more than a log line.
        if self._session.get_providers()[0] != wanted:
            raise EngineUnavailableError(f"engine {self.name}: {wanted} did not start")
        inputs = {node.name: node for node in self._session.get_inputs()}
        check_names(self.name, onnx_path, list(inputs), [output.name for output in self._session.get_outputs()])
        self.input_size = int(inputs[INPUT].shape[1])

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        outputs = [LOGITS, EMBEDDING, CAM] if with_cam else [LOGITS, EMBEDDING]
        images = check_images(images, self.input_size)
        try:
            return EngineOutput(*self._session.run(outputs, {INPUT: images}))
        except Exception as error:
            # The CUDA provider takes its memory when it first runs.
            if _short_of_memory(error):
                text = f"engine {self.name}: too little memory: {' '.join(str(error).split())}"
                raise EngineUnavailableError(text) from error
            raise

    def warm_up(self, batch: int) -> None:
        self.run(np.zeros((batch, self.input_size, self.input_size, 3), np.uint8))


def _short_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "failed to allocate memory" in text
