"""From an ONNX network to a TensorRT engine, and the cache of built engines.

One adapter for `tensorrt` (10 and 11) and `tensorrt-rtx`, whose Python interfaces agree in what is used here. Networks
are strongly typed: the precision is the ONNX file's own (float16 weights, or Q/DQ pairs around int8 layers).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from modeling.engine_interface import INPUT, EngineUnavailableError, check_names

logger = logging.getLogger(__name__)

_MODULES = ("tensorrt", "tensorrt_rtx")


class BatchProfile(BaseModel):
    """Batch sizes that an engine takes: from `minimum` to `maximum`, tuned for `optimum`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minimum: int = Field(1, ge=1)
    optimum: int = Field(8, ge=1)
    maximum: int = Field(32, ge=1)

    def model_post_init(self, _: Any) -> None:
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"batch profile {self.minimum}, {self.optimum}, {self.maximum}: expected ascending sizes")


class EngineKey(BaseModel):
    """Everything that a built engine depends on; another value of any field is another engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    onnx_sha256: str
    library: str = Field(description="tensorrt or tensorrt_rtx, with its version")
    gpu: str
    compute_capability: str
    driver: str
    profile: BatchProfile
    precision: str

    @property
    def digest(self) -> str:
        """Hex sha256 of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def tensorrt_module() -> Any:
    """The installed TensorRT's Python module, `tensorrt` before `tensorrt_rtx`.

    Raises:
        EngineUnavailableError: neither is installed, or its libraries do not load.
    """
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                reasons.append(f"{name}: {error}")
        except (ImportError, OSError, RuntimeError) as error:  # the bindings are there, a shared library is not
            reasons.append(f"{name}: {error}")
    detail = "; ".join(reasons) or "not installed (pip install dermray[tensorrt], or dermray[tensorrt-rtx])"
    raise EngineUnavailableError(f"engine tensorrt: {' '.join(detail.split())}")


def library_version() -> str:
    """Name and version of the installed TensorRT, as the cache key has it."""
    module = tensorrt_module()
    return f"{module.__name__} {module.__version__}"


def build_plan(
    onnx_path: Path,
    profile: BatchProfile,
    compute_capability: str | None = None,
    timing_cache: Path | None = None,
) -> bytes:
    """Parses and builds a network; returns the serialized engine ("plan").

    Args:
        onnx_path: input `images` uint8 (N, S, S, 3) with a dynamic first dimension.
        profile: batch sizes.
        compute_capability: e.g. "8.9", of a GPU that need not be here (TensorRT-RTX only); None: the GPU that is here.
        timing_cache: a file where measured kernels are kept between builds; an unusable one is replaced. TensorRT-RTX
            measures none.

    Raises:
        EngineUnavailableError: TensorRT is missing, or finds no device to build for.
        ValueError: an operator that TensorRT does not know, or another network that it cannot build.
    """
    trt = tensorrt_module()
    messages = _Messages(trt)
    # A builder without a driver to talk to is None, or an error.
    try:
        builder = trt.Builder(messages.logger)
    except (RuntimeError, TypeError) as error:
        raise EngineUnavailableError(f"engine tensorrt: no builder: {messages.text or error}") from error
    # TensorRT 11 has no other kind; 10 and RTX have a flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse(Path(onnx_path).read_bytes()):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        problems = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
        raise ValueError(f"engine tensorrt: {onnx_path} cannot be parsed: {' '.join(problems.split())}")
    # Some damaged files parse as a network of nothing.
    inputs = [network.get_input(number).name for number in range(network.num_inputs)]
    check_names("tensorrt", onnx_path, inputs, [network.get_output(n).name for n in range(network.num_outputs)])
    config = builder.create_builder_config()
    shape = tuple(network.get_input(0).shape)[1:]
    shapes = builder.create_optimization_profile()
    shapes.set_shape(INPUT, *((size, *shape) for size in (profile.minimum, profile.optimum, profile.maximum)))
    config.add_optimization_profile(shapes)
    # TensorFloat-32 keeps ten bits of a float32's mantissa: no longer the network that float32 limits are meant for.
    config.clear_flag(trt.BuilderFlag.TF32)
    if compute_capability is not None:
        _target(trt, config, compute_capability)
    given_memory = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if trt.__name__ == "tensorrt_rtx" and given_memory is not None:
        # TensorRT-RTX runs inside a CUDA graph only with memory that it was given.
        config.set_flag(given_memory)
    if timing_cache is not None:
        _use_timings(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        problem = f"engine tensorrt: {onnx_path} cannot be built: {messages.text}"
        raise EngineUnavailableError(problem) if _short_of_memory(messages.text) else ValueError(problem)
    if timing_cache is not None:
        _keep_timings(config, timing_cache)
    return bytes(plan)


def _short_of_memory(text: str) -> bool:
    return any(words in text.lower() for words in ("out of memory", "insufficient memory", "outofmemory"))


def _use_timings(config: Any, file: Path) -> None:
    """Starts the build from the timings in a file; from none where it is missing, damaged or of another device."""
    try:
        data = file.read_bytes()
    except OSError:  # none yet, or a folder that nobody may read
        data = b""
    known = config.create_timing_cache(data)
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, file: Path) -> None:
    timings = config.get_timing_cache()
    data = None if timings is None else timings.serialize()
    if data is None or not len(bytes(data)):
        return
    try:
        _write(file, bytes(data))
    except OSError as error:
        logger.warning("TensorRT's timings cannot be kept: %s", error)


def _target(trt: Any, config: Any, compute_capability: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    name = f"SM{compute_capability.replace('.', '')}"
    if known is None or not hasattr(known, name):
        raise EngineUnavailableError(f"engine tensorrt: {library_version()} does not build for {name}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(known, name), 0)


class _Messages:
    """Keeps what TensorRT logs as errors, which its exceptions leave out."""

    def __init__(self, trt: Any):
        lines: list[str] = []
        errors = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in errors:
                    lines.append(message)

        self.logger, self._lines = Logger(), lines

    @property
    def text(self) -> str:
        return " ".join("; ".join(self._lines).split())


def quiet_logger() -> Any:
    """A TensorRT logger that collects instead of printing; it must outlive what is made with it."""
    return _Messages(tensorrt_module()).logger


def cached_plan(folder: Path, key: EngineKey, build: Callable[[], bytes], accept: Callable[[bytes], bool]) -> bytes:
    """The plan of this key: the cached one if it is whole, made for this key and accepted, else a new one, cached.

    Processes that need the same plan wait for the one that builds it. Without a cache that can be written to, the plan
    is built each time.

    Args:
        accept: whether the runtime takes the plan; one that it refuses is built again once.
    """
    file, plan = folder / f"{key.digest}.plan", None
    try:
        with _locked(folder / f"{key.digest}.lock"):
            plan = _read(file, key)
            if plan is None or not accept(plan):
                plan = build()
                _keep(file, key, plan)
    except OSError as error:
        logger.warning("TensorRT's cache %s cannot be used: %s", folder, error)
    return build() if plan is None else plan


def _keep(file: Path, key: EngineKey, plan: bytes) -> None:
    facts = {"key": key.model_dump(), "sha256": hashlib.sha256(plan).hexdigest()}
    # The description last: a plan without one is not read.
    _write(file, plan)
    _write(file.with_suffix(".json"), json.dumps(facts, indent=1).encode())


def _read(file: Path, key: EngineKey) -> bytes | None:
    """None where there is no plan, a damaged one, or one for another key."""
    try:
        facts = json.loads(file.with_suffix(".json").read_bytes())
        plan = file.read_bytes()
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(facts, dict) and facts.get("sha256") == hashlib.sha256(plan).hexdigest()
    return plan if whole and facts.get("key") == key.model_dump() else None


def _write(file: Path, data: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.replace(partial, file)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
