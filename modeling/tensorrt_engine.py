"""TensorRT as an engine on NVIDIA GPUs: one CUDA graph per batch size, pinned staging buffers, a stream of its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modeling.bundle import default_cache_dir
from modeling.bundle_manifest import sha256_file
from modeling.engine_interface import (
    CAM,
    EMBEDDING,
    INPUT,
    LOGITS,
    EngineOutput,
    EngineUnavailableError,
    check_images,
)
from modeling.tensorrt_build import (
    BatchProfile,
    EngineKey,
    build_plan,
    cached_plan,
    library_version,
    quiet_logger,
    tensorrt_module,
)

_DRIVER = Path("/proc/driver/nvidia/version")


class TensorRtOptions(BaseModel):
    """`batches` are captured as CUDA graphs; a batch between two runs in the larger one, a larger batch in parts."""

    model_config = ConfigDict(extra="forbid")

    batches: list[int] = Field([1, 8, 32], min_length=1)
    precision: str = Field("fp32", description="of the network; part of the cache's key")
    cuda_graphs: bool = True


class TensorRtEngine:
    """TensorRT on the first visible GPU. `run` may be called from several threads; one runs at a time.

    Raises:
        EngineUnavailableError: no TensorRT, no torch with CUDA, no GPU or driver, or too little of its memory.
        ValueError: a network that TensorRT cannot parse or build.
    """

    def __init__(
        self,
        onnx_path: str | Path,
        batches: list[int],
        precision: str = "fp32",
        cuda_graphs: bool = True,
        cache_dir: Path | None = None,
    ):
        trt, torch = tensorrt_module(), _torch_with_gpu()
        self.name = trt.__name__.replace("_", "-")
        sizes = sorted(set(batches))
        if sizes[0] < 1:
            raise ValueError(f"engine {self.name}: batches {batches}; expected sizes of at least 1")
        self._lock = threading.Lock()
        # CUDA's errors are torch's RuntimeErrors; TensorRT's bindings make a TypeError of an object that they did not
        # get. None of them says that the model is wrong, so another engine may run it.
        try:
            self._engine = self._load(Path(onnx_path), sizes, precision, cache_dir or default_cache_dir() / "tensorrt")
            self.input_size = int(self._engine.get_tensor_shape(INPUT)[1])
            self._stream = torch.cuda.Stream()
            memory = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device="cuda")
            self._lanes = {size: _Lane(trt, self._engine, memory, self._stream, size, cuda_graphs) for size in sizes}
        except (RuntimeError, TypeError) as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise EngineUnavailableError(f"engine {self.name}: this GPU does not run it: {detail}") from error

    def _load(self, onnx_path: Path, sizes: list[int], precision: str, folder: Path) -> Any:
        self._logger = quiet_logger()
        self._runtime = tensorrt_module().Runtime(self._logger)
        profile = BatchProfile(minimum=1, optimum=sizes[len(sizes) // 2], maximum=sizes[-1])
        loaded: list[Any] = []

        def accept(plan: bytes) -> bool:
            loaded[:] = [self._runtime.deserialize_cuda_engine(plan)]
            return loaded[0] is not None

        plan = cached_plan(
            folder,
            engine_key(onnx_path, profile, precision),
            lambda: build_plan(onnx_path, profile, timing_cache=folder / "timings.bin"),
            accept,
        )
        if not (loaded and loaded[0] is not None) and not accept(plan):
            raise RuntimeError("it does not load the engine that was built for it")
        return loaded[0]

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        images = check_images(images, self.input_size)
        parts = []
        with self._lock:
            start = 0
            while start < len(images):
                left = len(images) - start
                size = next((size for size in self._lanes if size >= left), max(self._lanes))
                parts.append(self._lanes[size].run(images[start : start + size], with_cam))
                start += size
        columns = [[getattr(part, name) for part in parts] for name in ("logits", "embedding", "cam")]
        return EngineOutput(*(None if column[0] is None else np.concatenate(column) for column in columns))

    def warm_up(self, batch: int) -> None:
        self.run(np.zeros((batch, self.input_size, self.input_size, 3), np.uint8))


class _Lane:
    """Buffers and the CUDA graph of one batch size. Lanes take turns, so they share one `memory` for activations."""

    def __init__(self, trt: Any, engine: Any, memory: Any, stream: Any, size: int, cuda_graphs: bool):
        import torch

        self._stream, self._graph, self._memory = stream, None, memory
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise RuntimeError(f"no execution context for batches of {size}")
        self._context.set_device_memory(memory.data_ptr(), memory.numel())
        self._context.set_input_shape(INPUT, (size, *tuple(engine.get_tensor_shape(INPUT))[1:]))
        self._host, self._device = {}, {}
        for name in (INPUT, LOGITS, EMBEDDING, CAM):
            shape = tuple(self._context.get_tensor_shape(name))
            dtype = torch.uint8 if name == INPUT else torch.float32
            self._host[name] = torch.zeros(shape, dtype=dtype, pin_memory=True)
            self._device[name] = torch.zeros(shape, dtype=dtype, device="cuda")
            self._context.set_tensor_address(name, self._device[name].data_ptr())
        # A first run outside of the graph: TensorRT may allocate in it.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._enqueue()
        stream.synchronize()
        capturable = getattr(self._context, "is_stream_capturable", lambda stream: True)
        if cuda_graphs and capturable(stream.cuda_stream):
            self._graph = torch.cuda.CUDAGraph()
            # A service captures its new model while its old one runs in another thread.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._enqueue()

    def _enqueue(self) -> None:
        self._device[INPUT].copy_(self._host[INPUT], non_blocking=True)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run the engine")
        for name in (LOGITS, EMBEDDING, CAM):
            self._host[name].copy_(self._device[name], non_blocking=True)

    def run(self, images: np.ndarray, with_cam: bool) -> EngineOutput:
        import torch

        # Rows beyond the batch hold earlier pictures, whose answers are not read.
        self._host[INPUT].numpy()[: len(images)] = images
        with torch.cuda.stream(self._stream):
            if self._graph is None:
                self._enqueue()
            else:
                self._graph.replay()
        self._stream.synchronize()
        names = (LOGITS, EMBEDDING, CAM) if with_cam else (LOGITS, EMBEDDING)
        return EngineOutput(*(self._host[name].numpy()[: len(images)].copy() for name in names))


def check_tensorrt() -> None:
    """Raises EngineUnavailableError where no TensorRT engine can run: no package, or no GPU."""
    tensorrt_module()
    _torch_with_gpu()


def engine_key(onnx_path: Path, profile: BatchProfile, precision: str) -> EngineKey:
    """The cache key of a network on the GPU that is here.

    Raises:
        EngineUnavailableError: no TensorRT, or no GPU.
    """
    torch = _torch_with_gpu()
    major, minor = torch.cuda.get_device_capability()
    return EngineKey(
        onnx_sha256=sha256_file(onnx_path),
        library=library_version(),
        gpu=torch.cuda.get_device_name(),
        compute_capability=f"{major}.{minor}",
        driver=_DRIVER.read_text(encoding="utf-8").splitlines()[0] if _DRIVER.exists() else "unknown",
        profile=profile,
        precision=precision,
    )


def _torch_with_gpu() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EngineUnavailableError(
            "engine tensorrt: it keeps its buffers with torch, which is not installed"
        ) from error
    if not torch.cuda.is_available():
        raise EngineUnavailableError("engine tensorrt: no CUDA driver or GPU that torch can use")
    return torch
