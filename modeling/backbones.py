"""Backbones by name, each reduced to one function from normalised pixels to a feature map (N, D, h, w).

Names are timm's, or `torchvision/<name>`. The scorer's head is linear on the map's mean, which is what makes its
activation maps exact, so whatever a family has between features and classifier comes before the mean:

- EfficientNet, MobileNetV2, ResNet, RegNet, DenseNet (with its last ReLU): the map is what their pooling takes.
- MobileNetV3 and V4, GhostNet (a convolution after pooling), ConvNeXt (a normalisation after pooling): the same layer
  with the same weights, at every position. Its input is a position instead of the mean of all.
- VGG: the 512 maps of its convolutions; its fully connected layers, nine tenths of its weights, are left out.
- ViT, DeiT, BEiT, EVA: the patch tokens after the final norm, as a map. Class and register tokens take part in
  attention and are dropped, so pre-trained weights of a class token's classifier start from the patches instead.
- Swin: its normalised map, with channels moved to the front.
"""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import nn

from modeling.torchvision_compat import prepare_torchvision

TORCHVISION = "torchvision/"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The layers before pooling of torchvision's families, told apart by the attributes that they have.
_TORCHVISION_PARTS = (
    ("features",),
    ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    ("stem", "trunk_output"),
    ("layers",),
)


@dataclass(frozen=True)
class FeatureLayout:
    """How a network's answer becomes a map.

    Attributes:
        order: NCHW and NHWC maps, or NLC tokens of a square map.
        prefix_tokens: class and register tokens before the patches.
        timm: the network is timm's: features first, then what its head holds before the classifier.
    """

    order: Literal["NCHW", "NHWC", "NLC"] = "NCHW"
    prefix_tokens: int = 0
    timm: bool = True


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier, randomly initialised.

    Attributes:
        network: its state dict has the family's own names.
        layout: for `feature_map`.
        dim: channels D of the map.
        mean, std: of the pixels that its pre-trained weights expect, per channel, in 0-1.
    """

    network: nn.Module
    layout: FeatureLayout
    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def create_backbone(name: str, input_size: int | None = None) -> Backbone:
    """Builds a backbone and tries it on one blank picture.

    Args:
        name: a timm model, with or without a tag, or `torchvision/<name>`.
        input_size: side of the pictures, which networks with position embeddings are built for; None: the family's.

    Raises:
        ValueError: an unknown name, a family without a feature map, or a size that it cannot take.
    """
    prepare_torchvision()
    if name.startswith(TORCHVISION):
        network, order, size = _torchvision_network(name), "NCHW", input_size or 224
        layout, mean, std = FeatureLayout(timm=False), IMAGENET_MEAN, IMAGENET_STD
    else:
        _check_timm_name(name)
        import timm

        # Position embeddings and attention windows are laid out for one size.
        facts = timm.get_pretrained_cfg(name)
        arguments = {"img_size": input_size} if input_size and facts is not None and facts.fixed_input_size else {}
        try:
            network = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **arguments)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(f"model.backbone = {name!r}: {_first_line(error)}") from error
        if type(network) is timm.models.vgg.VGG:
            network.pre_logits = nn.Identity()
        config = network.default_cfg
        order, size = getattr(network, "output_fmt", "NCHW"), input_size or config["input_size"][-1]
        layout, mean, std = FeatureLayout(order), config["mean"], config["std"]
        embed = getattr(network, "patch_embed", None)
        if isinstance(embed, timm.layers.PatchEmbed) and size % embed.patch_size[0] and not embed.dynamic_img_pad:
            # It would run, and never see the rest of the picture.
            side = embed.patch_size[0]
            raise ValueError(f"model.backbone = {name!r} at {size} px: expected a multiple of its patches' {side} px")
    layout, dim = _tried(name, network, layout, size)
    return Backbone(network, layout, dim, tuple(mean), tuple(std))


def feature_map(network: nn.Module, layout: FeatureLayout, pixels: torch.Tensor) -> torch.Tensor:
    """Float32 (N, D, h, w) of normalised pixels float32 (N, 3, S, S)."""
    if not layout.timm:
        return network(pixels)
    features = network.forward_features(pixels)
    if layout.order == "NLC":
        patches = features[:, layout.prefix_tokens :].transpose(1, 2)
        side = isqrt(patches.shape[2])
        return patches.unflatten(2, (side, side))
    features = network.forward_head(features, pre_logits=True)
    return features.permute(0, 3, 1, 2) if layout.order == "NHWC" else features


def stem_and_stages(network: nn.Module) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """What `frozen_blocks` counts: the modules before the first stage, and each stage's modules in order.

    Stages are the members of `blocks` (EfficientNet, MobileNet, ViT), `stages` (ConvNeXt) or `layers` (Swin), or
    `layer1`... (ResNet); of `features` they are DenseNet's dense blocks with their transitions, VGG's groups between
    poolings, and otherwise all members but the first. Without any of these the list is empty.
    """
    children = list(network.named_children())
    for position, (name, child) in enumerate(children):
        before = [module for _, module in children[:position]]
        if name in ("blocks", "stages", "layers", "trunk_output"):
            return before, [[stage] for stage in child.children()]
        if name == "features":
            stem, stages = _cut_features(child)
            return [*before, *stem], stages
        if numbered := re.fullmatch(r"(layer|stage|s)\d", name):
            same = re.compile(rf"{numbered[1]}\d")
            return before, [[module] for other, module in children if same.fullmatch(other)]
    return [], []


def _cut_features(features: nn.Module) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    parts = list(features.named_children())
    starts = [number for number, (name, _) in enumerate(parts) if name.startswith("denseblock")]
    if not starts:
        pools = [number for number, (_, part) in enumerate(parts) if isinstance(part, nn.MaxPool2d)]
        starts = [0, *(number + 1 for number in pools if number + 1 < len(parts))] if pools else range(1, len(parts))
    ends = [*starts[1:], len(parts)]
    modules = [part for _, part in parts]
    return modules[: starts[0]], [modules[start:end] for start, end in zip(starts, ends, strict=True)]


def _check_timm_name(name: str) -> None:
    import timm

    known = timm.list_models()
    if name in known or ("." in name and name in timm.list_pretrained()):
        return
    raise ValueError(f"model.backbone = {name!r}: not a timm model name{_close(name, [*known, *_torchvision_names()])}")


def _torchvision_names() -> list[str]:
    import torchvision

    return [TORCHVISION + name for name in torchvision.models.list_models(module=torchvision.models)]


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f" and not {TORCHVISION}<name>"


def _torchvision_network(name: str) -> nn.Module:
    known = _torchvision_names()
    if name not in known:
        raise ValueError(f"model.backbone = {name!r}: not a torchvision classifier{_close(name, known)}")
    import torchvision

    model = torchvision.models.get_model(name.removeprefix(TORCHVISION), weights=None)
    found = [parts for parts in _TORCHVISION_PARTS if all(hasattr(model, part) for part in parts)]
    if not found:
        raise ValueError(f"model.backbone = {name!r}: it has no feature map that can be cut out; look for it in timm")
    layers = OrderedDict((part, getattr(model, part)) for part in found[0])
    if isinstance(model, torchvision.models.DenseNet):
        layers["relu"] = nn.ReLU()
    elif isinstance(model, torchvision.models.ConvNeXt):
        layers["classifier"] = nn.Sequential(model.classifier[0])
    elif isinstance(model, torchvision.models.SwinTransformer):
        layers |= {"norm": model.norm, "permute": model.permute}
    return nn.Sequential(layers)


def _tried(name: str, network: nn.Module, layout: FeatureLayout, size: int) -> tuple[FeatureLayout, int]:
    """The layout, completed where the network gives tokens, and the number of channels."""
    network.eval()
    try:
        with torch.no_grad():
            pixels = torch.zeros((1, 3, size, size))
            if layout.timm and (features := network.forward_features(pixels)).ndim == 3:
                prefix = int(getattr(network, "num_prefix_tokens", 0))
                layout = FeatureLayout("NLC", prefix)
                patches = features.shape[1] - prefix
                if isqrt(patches) ** 2 != patches:
                    raise ValueError(f"{patches} patch tokens are no square map")
            maps = feature_map(network, layout, pixels)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model.backbone = {name!r} at {size} px: {_first_line(error)}") from error
    if maps.ndim != 4:
        raise ValueError(f"model.backbone = {name!r}: its features are {tuple(maps.shape)}, not a map")
    network.train()
    return layout, int(maps.shape[1])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
