"""Inference engines behind one small interface: uint8 pictures in, logits, embedding and activation maps out.

An engine choice is plain JSON, so that it can travel in a Serve `user_config`:

    {"engine": "onnxruntime", "options": {"threads": 1, "provider": "cpu"}}
    {"buckets": {"1": <choice>, "8": <choice>, "32": <choice>}}     the fastest engine differs by batch size

A further engine (OpenVINO, TensorRT) is a class with `run` and `warm_up` and one line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modeling.bundle import Bundle

INPUT = "images"
OUTPUTS = ("logits", "embedding")
CAM = "cam"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class EngineOutput:
    """What the network says about N pictures.

    Attributes:
        logits: float32 (N, K).
        embedding: float32 (N, D).
        cam: class-activation maps float32 (N, K, h, w), where they were asked for.
    """

    logits: np.ndarray
    embedding: np.ndarray
    cam: np.ndarray | None = None


class Engine(Protocol):
    """Runs the image model of one bundle on one device."""

    name: str

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        """Scores uint8 RGB (N, S, S, 3), N >= 1; ValueError for any other shape or dtype."""
        ...

    def warm_up(self, batch: int) -> None:
        """Runs one batch of that size, so that the first request does not pay for allocation or autotuning."""
        ...


class OnnxRuntimeOptions(BaseModel):
    """`threads` of one run (CPU); `provider` cpu or cuda."""

    model_config = ConfigDict(extra="forbid")

    threads: int = Field(1, ge=1, le=1024)
    provider: Literal["cpu", "cuda"] = "cpu"


class OnnxRuntimeEngine:
    """ONNX Runtime on CPU or CUDA. `run` may be called from several threads.

    Raises:
        ValueError: the provider is not there, or fails to start; the file is not a usable ONNX model.
    """

    def __init__(self, onnx_path: str | Path, threads: int = 1, provider: str = "cpu"):
        import onnxruntime

        self.name = f"onnxruntime-{provider}-{threads}" if provider == "cpu" else f"onnxruntime-{provider}"
        wanted = _PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise ValueError(f"engine {self.name}: this onnxruntime has no {wanted}")
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
            raise ValueError(
                f"engine {self.name}: {onnx_path} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        # A CUDA provider whose libraries are missing is replaced by the CPU with no more than a log line.
        if self._session.get_providers()[0] != wanted:
            raise ValueError(f"engine {self.name}: {wanted} did not start")
        names = [output.name for output in self._session.get_outputs()]
        inputs = {node.name: node for node in self._session.get_inputs()}
        missing = [name for name in (*OUTPUTS, CAM) if name not in names] + [
            name for name in (INPUT,) if name not in inputs
        ]
        if missing:
            raise ValueError(f"engine {self.name}: {onnx_path} lacks {', '.join(missing)}")
        self.input_size = int(inputs[INPUT].shape[1])

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        expected = (self.input_size, self.input_size, 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; expected uint8 (N, {self.input_size}, {self.input_size}, 3)"
            )
        outputs = (*OUTPUTS, CAM) if with_cam else OUTPUTS
        return EngineOutput(*self._session.run(list(outputs), {INPUT: np.ascontiguousarray(images)}))

    def warm_up(self, batch: int) -> None:
        self.run(np.zeros((batch, self.input_size, self.input_size, 3), np.uint8))


class BucketedEngine:
    """Several engines, chosen by batch size: the smallest bucket that holds the batch, else the largest."""

    def __init__(self, engines: Mapping[int, Engine]):
        if not engines or min(engines) < 1:
            raise ValueError(f"engine buckets {sorted(engines)}: expected batch sizes of at least 1")
        self._buckets = sorted(engines)
        self._engines = dict(engines)
        self.name = "|".join(f"{bucket}:{self._engines[bucket].name}" for bucket in self._buckets)

    def engine_for(self, batch: int) -> Engine:
        fitting = [bucket for bucket in self._buckets if bucket >= batch]
        return self._engines[fitting[0] if fitting else self._buckets[-1]]

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        return self.engine_for(len(images)).run(images, with_cam)

    def warm_up(self, batch: int) -> None:
        self.engine_for(batch).warm_up(batch)


def _create_onnxruntime(bundle: Bundle, options: Mapping[str, Any]) -> Engine:
    chosen = OnnxRuntimeOptions.model_validate(dict(options))
    return OnnxRuntimeEngine(bundle.onnx_path, chosen.threads, chosen.provider)


ENGINES: dict[str, Callable[[Bundle, Mapping[str, Any]], Engine]] = {"onnxruntime": _create_onnxruntime}
DEFAULT_CHOICE: dict[str, Any] = {"engine": "onnxruntime", "options": {"threads": 1, "provider": "cpu"}}


def create_engine(bundle: Bundle, engine_choice: Mapping[str, Any] | None = None) -> Engine:
    """Builds the engine a choice describes; None means ONNX Runtime, one CPU thread.

    Raises:
        ValueError: unknown engine, wrong options, or an engine that does not start here.
    """
    choice = DEFAULT_CHOICE if engine_choice is None else engine_choice
    if "buckets" in choice:
        if set(choice) != {"buckets"} or not isinstance(choice["buckets"], Mapping):
            raise ValueError(
                f"engine choice {dict(choice)!r}: buckets take no other key and map batch sizes to choices"
            )
        # Buckets that agree share one session.
        built: dict[str, Engine] = {}
        engines = {}
        for bucket, inner in choice["buckets"].items():
            if not str(bucket).isdecimal():
                raise ValueError(f"engine bucket {bucket!r}: expected a batch size")
            key = repr(inner)
            if key not in built:
                built[key] = create_engine(bundle, inner)
            engines[int(bucket)] = built[key]
        return BucketedEngine(engines)
    unknown = sorted(set(choice) - {"engine", "options"})
    if unknown or choice.get("engine") not in ENGINES:
        what = f"unknown keys {unknown}" if unknown else f"unknown engine {choice.get('engine')!r}"
        raise ValueError(f"engine choice: {what}; known engines: {sorted(ENGINES)}")
    try:
        return ENGINES[choice["engine"]](bundle, choice.get("options", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"engine {choice['engine']} option {field} = {first['input']!r}: {first['msg']}") from error
