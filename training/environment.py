"""Where a run was made: what its scores may depend on beside code, config and data."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

# Distributions whose arithmetic, or whose order of rows, ends up in the scores.
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ray",
    "lightgbm",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "onnx",
    "onnxruntime",
    "opencv-python-headless",
    "albumentations",
)


def describe_environment() -> dict[str, Any]:
    """The environment of this process and its Ray cluster, JSON-ready; no host name, user or path.

    Returns:
        {"python", "platform", "machine": CPU architecture, "cpus": cores this process may use, "torch_threads",
        "gpus": names of this process's GPUs, "ray_resources": of the cluster, None where none is connected;
        "packages": name -> version, None where it is not installed}.
    """
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "ray_resources": _ray_resources(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _ray_resources() -> dict[str, float] | None:
    """CPUs, GPUs and kinds of accelerator of the connected cluster, where train workers run."""
    import ray

    if not ray.is_initialized():
        return None
    resources = ray.cluster_resources()
    # The others are memory sizes, which decide nothing, and `node:<address>`.
    named = {name for name in resources if name in ("CPU", "GPU") or name.startswith("accelerator_type:")}
    return {name: resources[name] for name in sorted(named)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
