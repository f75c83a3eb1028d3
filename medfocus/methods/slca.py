"""SAM with Spatially Localized Channel Attention (arXiv 2505.06217): gates on SAM2's frozen image features.

The equations are a reconstruction from the paper's description. Where the description is silent, they may
differ from the authors' equations. For the features S of an image,

    z = AvgPool_{k x k}(S), with stride k          one descriptor per window instead of one per image
    a = σ(W2 ReLU(W1 z)), 1 x 1 convolutions       squeeze and excitation (arXiv 1709.01507), reduction r
    X' = S ⊙ up(a), nearest neighbour              each window gates its own channels

and a linear head on the global average of X'. With k = G this is plain squeeze and excitation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.method import Method, Support, with_prefix
from medfocus.learning.training import Schedule, seeded, train


class Attention(nn.Module):
    """S -> S ⊙ up(σ(W2 ReLU(W1 AvgPool(S))))."""

    def __init__(self, channels: int, pool: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.pool = pool  # k
        self.down = nn.Conv2d(channels, hidden, 1)  # W1
        self.up = nn.Conv2d(hidden, channels, 1)  # W2

    def gates(self, features: Tensor) -> Tensor:
        """S (B, C, G, G) -> a (B, C, G/k, G/k) in (0, 1)."""
        pooled = functional.avg_pool2d(features, self.pool)  # (B, C, G/k, G/k)
        return self.up(self.down(pooled).relu()).sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """S (B, C, G, G) -> X' (B, C, G, G)."""
        return features * functional.interpolate(self.gates(features), scale_factor=self.pool, mode="nearest")


class Classifier(nn.Module):
    """Standardised channels, attention, global average and linear head."""

    mean: Tensor  # (C,) over the cells of the support's images
    std: Tensor  # (C,)

    def __init__(self, channels: int, classes: int, grid: int, pool: int, reduction: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.attention = Attention(channels, pool, reduction)
        self.head = nn.Linear(channels, classes)

    def cells(self, inputs: Tensor) -> Tensor:
        """Flat features (B, C G G), channel-major and then row-major -> (B, C, G, G)."""
        return inputs.float().unflatten(1, (-1, self.grid, self.grid))

    def standardise_like(self, inputs: Tensor) -> None:
        """Take mean and deviation from inputs (N, C G G); a constant channel is only centred."""
        std, mean = torch.std_mean(self.cells(inputs).double(), dim=(0, 2, 3), correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-5 * mean.abs(), std, 1.0))

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, C G G) -> the global average of X' (B, C)."""
        features = (self.cells(inputs) - self.mean[:, None, None]) / self.std[:, None, None]
        return self.attention(features).mean(dim=(2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C G G) -> logits (B, K)."""
        return self.head(self.encode(inputs))


@dataclass
class Slca(Schedule, Method):
    """The attention and the head learn by cross-entropy; SAM2's image encoder stays frozen.

    S concatenates the segmenter's two feature levels, averaged to one grid: d + d/4 channels. The deep level
    shows content and the fine level shows edges. A gate that sees both can weigh them against each other.
    """

    takes_views: ClassVar[bool] = True
    segmenter_grid: int  # G, cells a side to which SAM2's image features are averaged
    pool: int  # k, cells a side of a window with its own gates; divides G
    reduction: int  # r of the gates' bottleneck: C to C / r
    classifier_: Classifier = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.segmenter_grid < 1:
            raise ValueError(f"slca: segmenter_grid is {self.segmenter_grid}; use 1 or more.")
        if self.pool < 1 or self.segmenter_grid % self.pool:
            raise ValueError(
                f"slca: pool is {self.pool} and segmenter_grid {self.segmenter_grid}; windows of pool x pool "
                "cells must tile the grid. Set pool to a divisor of segmenter_grid."
            )
        if self.reduction < 1:
            raise ValueError(f"slca: reduction is {self.reduction}; use 1 or more (usual: 16).")

    @property
    def embedding(self) -> str:
        """The segmenter's image features on its grid."""
        return f"segmenter-{self.segmenter_grid}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> S of their RGB channels, flattened, (B, C' G G) float32.

        Raises ValueError if the encoder has no segmenter with image features.
        """
        return self.encoder.describe(images, self.segmenter_grid).float()

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Standardise by the support's unaugmented images, then train attention and head."""
        inputs, labels = support.inputs, support.labels  # (V, N, C G G), (N,)
        channels = inputs.shape[-1] // self.segmenter_grid**2
        with seeded(generator.initial_seed()):
            classifier = self._untrained(channels, len(support.text_features)).to(inputs.device)
        classifier.standardise_like(inputs[0])

        def loss(index: Tensor, view: Tensor) -> Tensor:
            return functional.cross_entropy(classifier(inputs[view, index]), labels[index])

        train(classifier.parameters(), loss, labels, self, views=len(inputs), generator=generator)
        self.classifier_ = classifier.eval()
        return self

    def _untrained(self, channels: int, classes: int) -> Classifier:
        return Classifier(channels, classes, self.segmenter_grid, self.pool, self.reduction)

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """Gated features, averaged over the image: (N, C G G) -> (N, C)."""
        return torch.cat([self.classifier_.encode(part) for part in inputs.split(256)])

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, C G G) -> logits (N, K) of the linear head."""
        return {"head": self.classifier_.head(self.encode(inputs))}

    def state(self) -> dict[str, Tensor]:
        """Return the channel statistics, W1 and W2 with their biases, and the head."""
        return self.classifier_.state_dict(prefix="classifier.")

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        classes, channels = state["classifier.head.weight"].shape
        self.classifier_ = self._untrained(channels, classes).eval()
        self.classifier_.load_state_dict(with_prefix(state, "classifier."))
        return self
