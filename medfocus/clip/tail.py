"""The trainable tail of an image encoder, and a cache of an encoder's activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.modules.batchnorm import _BatchNorm

from medfocus.clip.towers.choose import image_tower

if TYPE_CHECKING:
    from medfocus.clip.regions import Region
    from medfocus.clip.towers.base import ImageTower


@dataclass(eq=False)
class ActivationCache:
    """The activations of the last batch, for further calls with the same batch.

    It keeps states only at depths that some call has requested, to save memory. The first request for a depth
    costs one more pass of its batch.
    """

    depths: set[int] = field(default_factory=set)  # 0: before the first block; n: after block n
    views: np.ndarray | Tensor | None = None  # (B, S, S, C) uint8
    pixels: Tensor | None = None  # the preprocessed views
    states: dict[int, list[Tensor]] = field(default_factory=dict)  # depth -> tokens or maps of each image
    bias: Tensor | None = None  # of the attention, by the region
    described: dict[int, Tensor] = field(default_factory=dict)  # grid -> the segmenter's features (B, P)

    def turn_to(self, views: np.ndarray | Tensor) -> None:
        """Forget the last batch unless ``views`` is the same object."""
        if self.views is not views:
            self.views, self.pixels, self.states, self.bias, self.described = views, None, {}, None, {}


class Tail(nn.Module):
    """The end of an image encoder: its last blocks, pooling and projection.

    The statistics of batch normalisation stay frozen while it trains, because few images cannot estimate
    them.
    """

    def __init__(self, visual: nn.Module, region: Region, skipped: int) -> None:
        """Wrap the result of ``ImageTower.tail`` for the states that ``region`` packs.

        ``skipped`` is the number of the encoder's first blocks that ``visual`` does not have.
        """
        super().__init__()
        self.visual = visual
        self.region = region
        self.skipped = skipped
        self._tower = image_tower(visual)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules except batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, packed: Tensor) -> Tensor:
        """Turn the result (B, ...) of ``ClipEncoder.trunk`` into image features (B, D) of length one."""
        states, bias = self.region.unpack(packed, self._tower)
        return self.region.merge([self._tower.run(state, bias) for state in states])

    def encode_layers(self, packed: Tensor, layers: tuple[int, ...], grid: int) -> Tensor:
        """Return what ``ClipEncoder.encode_layers`` returns, (B, D + P), from the result of ``trunk``.

        ``layers`` are those of the whole encoder, and none lies before the tail.
        """
        states, bias = self.region.unpack(packed, self._tower)
        parts = []
        for number in range(self._tower.depth + 1):
            if number:
                states = [self._tower.block(number, state, bias) for state in states]
            if number + self.skipped in layers:
                parts.append(cells(self._tower, states, grid))
        image = self.region.merge([self._tower.pool(state, bias) for state in states])
        return torch.cat([image, *parts], dim=1)


def cells(tower: ImageTower, states: Sequence[Tensor], grid: int) -> Tensor:
    """Average the maps (B, W, G, G) of n images to (B, n * W * grid * grid), side by side."""
    return torch.cat([adaptive_avg_pool2d(tower.maps(state), grid).flatten(1) for state in states], dim=1)
