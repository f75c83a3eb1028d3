"""SAM with Spatially Localized Channel Attention (arXiv 2505.06217): SAM2's frozen image features, gated.

The equations are a reconstruction and no transcription; the authors' may differ in what they leave out. For
the features S of an image,

    z = AvgPool_{k x k}(S), with stride k          one description a window, not one for the whole image
    a = σ(W2 ReLU(W1 z)), 1 x 1 convolutions       squeeze and excitation (arXiv 1709.01507), reduction r
    X' = S ⊙ up(a), nearest neighbour              each window's channels are gated by itself alone

and a linear head on the global average of X'. With k = G it is squeeze and excitation as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.method import Support
from medfocus.learning.training import train

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


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

    mean: Tensor  # (C,) of the support, over its images and their cells
    std: Tensor  # (C,)

    def __init__(self, channels: int, classes: int, grid: int, pool: int, reduction: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.attention = Attention(channels, pool, reduction)
        self.head = nn.Linear(channels, classes)

    def cells(self, inputs: Tensor) -> Tensor:
        """What a segmenter described (B, C G G), channel after channel and row after row -> (B, C, G, G)."""
        return inputs.float().unflatten(1, (-1, self.grid, self.grid))

    def standardise_like(self, inputs: Tensor) -> None:
        """Take mean and deviation from inputs (N, C G G); a channel that is constant is only centred."""
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
class Slca:
    """The attention and the head learn by cross-entropy; SAM2's image encoder stays frozen.

    S has the channels of both levels that the segmenter describes, which it averages to the same cells:
    level behind level they are d + d/4 channels of one grid. The deep level knows what is there, the finer
    one how its edges look, and a gate may weigh one against the other only if it sees both.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    segmenter_grid: int  # G, cells a side to which SAM2's image features are averaged
    pool: int  # k, cells a side of a window with gates of its own; divides G
    reduction: int  # r of the gates' bottleneck: C to C / r
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    classifier_: Classifier = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.segmenter_grid < 1:
            raise ValueError(
                f"slca: segmenter_grid is {self.segmenter_grid}; use 1 or more, it sees nothing else."
            )
        if self.pool < 1 or self.segmenter_grid % self.pool:
            raise ValueError(
                f"slca: pool is {self.pool} and segmenter_grid {self.segmenter_grid}; windows of pool x pool "
                "cells have to tile the grid. Set pool to a divisor of segmenter_grid."
            )
        if self.reduction < 1:
            raise ValueError(f"slca: reduction is {self.reduction}; use 1 or more, usual is 16.")

    @property
    def embedding(self) -> str:
        """The segmenter's image features on its grid."""
        return f"segmenter-{self.segmenter_grid}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8, of which RGB is seen -> S, flattened, (B, C' G G) float32.

        Raises ValueError where no segmenter stands beside the encoder.
        """
        return self.encoder.describe(images, self.segmenter_grid).float()

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Standardise by the support's unaugmented images, then train attention and head."""
        inputs, labels = support.inputs, support.labels  # (V, N, C G G), (N,)
        channels = inputs.shape[-1] // self.segmenter_grid**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            classifier = self._untrained(channels, len(support.text_features)).to(inputs.device)
        classifier.standardise_like(inputs[0])
        train(
            classifier.parameters(),
            lambda index, view: functional.cross_entropy(classifier(inputs[view, index]), labels[index]),
            labels,
            views=len(inputs),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            generator=generator,
        )
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
        """The channels' statistics, W1, W2 with their biases, and the head."""
        return {f"classifier.{name}": value for name, value in self.classifier_.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        classes, channels = state["classifier.head.weight"].shape
        self.classifier_ = self._untrained(channels, classes).eval()
        self.classifier_.load_state_dict({k.removeprefix("classifier."): v for k, v in state.items()})
        return self
