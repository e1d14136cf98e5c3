"""Engines by choice. An engine choice is plain JSON, so that it can travel in a Serve `user_config`:

    {"engine": "onnxruntime", "options": {"threads": 1, "provider": "cpu"}}
    {"engine": "openvino", "network": {"uri": ".../int8.onnx", "sha256": "...", "precision": "int8"}}
    {"buckets": {"1": <choice>, "8": <choice>, "32": <choice>}}     the fastest engine differs by batch size

`max_delta_p` beside an engine is how far its probabilities were from torch's on the bundle's recorded pictures where it
was judged; `start_engine` sees that they are no farther where it runs.

A further engine is a class with `run` and `warm_up` and one line in `ENGINES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from modeling.bundle import Bundle, default_cache_dir
from modeling.engine_interface import Engine, EngineOutput, EngineUnavailableError
from modeling.network_file import NetworkFile
from modeling.onnxruntime_engine import OnnxRuntimeEngine, OnnxRuntimeOptions
from modeling.openvino_engine import OpenVinoEngine, OpenVinoOptions
from modeling.recorded_answers import measure_parity
from modeling.tensorrt_engine import TensorRtEngine, TensorRtOptions

logger = logging.getLogger(__name__)

_FLOAT32_DELTA_P = 1e-3
DEFAULT_CHOICE: dict[str, Any] = {"engine": "onnxruntime", "options": {"threads": 1, "provider": "cpu"}}
# Each takes the network's path and its options' fields as keywords.
ENGINES: dict[str, tuple[type[BaseModel], Callable[..., Engine]]] = {
    "onnxruntime": (OnnxRuntimeOptions, OnnxRuntimeEngine),
    "openvino": (OpenVinoOptions, OpenVinoEngine),
    "tensorrt": (TensorRtOptions, TensorRtEngine),
}


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


def create_engine(bundle: Bundle, engine_choice: Mapping[str, Any] | None = None) -> Engine:
    """Builds the engine a choice describes; None means ONNX Runtime, one CPU thread.

    Raises:
        EngineUnavailableError: an engine that this machine cannot run.
        ValueError: unknown engine, wrong options, or a network that is gone, changed or damaged.
    """
    choice = DEFAULT_CHOICE if engine_choice is None else engine_choice
    if "buckets" in choice:
        return _create_buckets(bundle, choice)
    unknown = sorted(set(choice) - {"engine", "options", "network", "max_delta_p"})
    if unknown or choice.get("engine") not in ENGINES:
        what = f"unknown keys {unknown}" if unknown else f"unknown engine {choice.get('engine')!r}"
        raise ValueError(f"engine choice: {what}; known engines: {sorted(ENGINES)}")
    options_type, create = ENGINES[choice["engine"]]
    try:
        options = options_type.model_validate(dict(choice.get("options", {})))
    except ValidationError as error:
        raise _wrong(f"engine {choice['engine']} option", error) from error
    network = _network(choice)
    path = bundle.onnx_path if network is None else network.fetch(default_cache_dir() / "networks")
    engine = create(path, **options.model_dump())
    if network is not None:
        engine.name += f"-{network.name}"
    return engine


def start_engine(
    bundle: Bundle, engine_choice: Mapping[str, Any] | None = None, batches: Sequence[int] = (1,)
) -> tuple[Engine, str | None]:
    """As `create_engine`, warm for batches of these sizes; where this machine cannot run the choice, or computes
    another function with it, the default engine, and why.

    A service keeps answering, with the same model but slower, when it meets a host without the GPU, the driver or the
    package that its choice was measured with.

    Raises:
        ValueError: as `create_engine`, or the default engine does not compute the bundle's recorded answers either.
    """
    reason = None
    if engine_choice is not None:
        try:
            return _started(bundle, engine_choice, batches), None
        except EngineUnavailableError as error:
            reason = str(error)
    try:
        engine = _started(bundle, DEFAULT_CHOICE, batches)
    except EngineUnavailableError as error:
        raise ValueError(f"bundle {bundle.digest[:16]}: {error}") from error
    if reason is not None:
        logger.warning("%s; %s runs instead", reason, engine.name)
    return engine, reason


def _started(bundle: Bundle, choice: Mapping[str, Any], batches: Sequence[int]) -> Engine:
    engine = create_engine(bundle, choice)
    buckets = choice.get("buckets", {"": choice})
    limit = max(inner.get("max_delta_p") or 0.0 for inner in buckets.values())
    for batch in batches:
        try:
            engine.warm_up(batch)
            found = measure_parity(engine, bundle.parity(), [batch]).probability
        except (ValueError, RuntimeError) as error:  # not finite, or refused by the device
            detail = " ".join(str(error).split())
            raise EngineUnavailableError(f"engine {engine.name}: it does not run on this machine: {detail}") from error
        # Another processor or driver adds in another order; twice as far and more is another function.
        if not found <= max(2 * limit, _FLOAT32_DELTA_P):
            raise EngineUnavailableError(
                f"engine {engine.name}: probabilities are up to {found:.2g} off torch's on this machine in batches of "
                f"{batch}, {limit:.2g} where the engine was chosen"
            )
    return engine


def _create_buckets(bundle: Bundle, choice: Mapping[str, Any]) -> Engine:
    if set(choice) != {"buckets"} or not isinstance(choice["buckets"], Mapping):
        raise ValueError(f"engine choice {dict(choice)!r}: buckets take no other key and map batch sizes to choices")
    # Buckets that agree share one engine.
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


def _network(choice: Mapping[str, Any]) -> NetworkFile | None:
    if choice.get("network") is None:
        return None
    try:
        return NetworkFile.model_validate(choice["network"])
    except ValidationError as error:
        raise _wrong("engine choice: network", error) from error


def _wrong(what: str, error: ValidationError) -> ValueError:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return ValueError(f"{what} {field} = {first['input']!r}: {first['msg']}")
