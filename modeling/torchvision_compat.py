"""Lets a CUDA build of torchvision import beside a CPU build of torch.

PyPI's torchvision registers fake kernels for `nms` and `qnms`, which exist only once its CUDA extension has loaded.
Beside a CPU torch that fails with `operator torchvision::nms does not exist`, so the two schemas are declared first.
"""

from __future__ import annotations

from typing import Any

_library: Any = None


def prepare_torchvision() -> None:
    """Declares torchvision's operator schemas when torch has no CUDA. Call before importing timm or torchvision."""
    global _library
    import torch

    if torch.version.cuda is not None or _library is not None:
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library = library
