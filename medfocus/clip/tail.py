"""The trainable tail of an image encoder, and a cache of an encoder's activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfocus.clip.towers.choose import image_tower

if TYPE_CHECKING:
    from medfocus.clip.regions import Region


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

    def __init__(self, visual: nn.Module, region: Region) -> None:
        """Wrap the result of ``ImageTower.tail`` for the states that ``region`` packs."""
        super().__init__()
        self.visual = visual
        self.region = region
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
