"""Convolutional nets as image towers: open_clip's ``ModifiedResNet``, and timm's nets in ``TimmModel``.

A block is a stage of the net, and the state between stages is its feature maps (B, W, G, G). A tail is a
copy of the whole net in which the modules before the tail are the identity.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medfocus.clip.towers.base import ImageTower

# timm's class -> the modules through which ``forward_features`` passes an image, in order. The modules of a
# name that ends in "." pass it one after the other.
CHAINS: dict[str, tuple[str, ...]] = {
    "ByobNet": ("stem", "stages.", "final_conv"),
    "ConvNeXt": ("stem", "stages.", "norm_pre"),
    "EfficientNet": ("conv_stem", "bn1", "blocks.", "conv_head", "bn2"),
    "RegNet": ("stem", "s1", "s2", "s3", "s4", "final_conv"),
    "ResNet": ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"),
}


class ConvolutionalTower(ImageTower):
    """The base of both kinds: a chain of modules, divided into layer 0, the blocks and the rest."""

    memory_format: ClassVar[torch.memory_format] = torch.channels_last  # takes half the time on a CPU

    @property
    @abstractmethod
    def _chain(self) -> list[str]:
        """Names of the modules that an image passes before ``_finish``, in order."""

    @property
    @abstractmethod
    def _layers(self) -> list[tuple[str, int]]:
        """The last module of each layer, and its pixels a cell."""

    @abstractmethod
    def _finish(self, maps: Tensor) -> Tensor:
        """Turn the result of the chain into image features (B, D)."""

    @property
    def verbs(self) -> frozenset[str]:
        """See ``Tower.verbs``."""
        return frozenset({"stages", "tail", "channel", "activation-maps"})

    @property
    def depth(self) -> int:
        """See ``ImageTower.depth``."""
        return len(self._layers) - 1

    def sides(self, image_size: int) -> tuple[int, ...]:
        """See ``ImageTower.sides``; a net that pads its images may have one cell more."""
        return tuple(max(1, image_size // pixels) for _, pixels in self._layers)

    def embed(self, pixels: Tensor) -> Tensor:
        """See ``ImageTower.embed``."""
        return self._pass(pixels, self._part(0))

    def block(self, number: int, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``ImageTower.block``."""
        assert bias is None
        return self._pass(state, self._part(number))

    def pool(self, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``ImageTower.pool``."""
        return normalize(self._finish(self._pass(state, self._part(self.depth + 1))), dim=-1)

    def maps(self, state: Tensor) -> Tensor:
        """See ``ImageTower.maps``."""
        return state

    def tail(self, blocks: int) -> nn.Module:
        """See ``ImageTower.tail``."""
        unused = [name for number in range(self.depth - blocks + 1) for name in self._part(number)]
        modules = [self.module.get_submodule(name) for name in unused]
        copied = copy.deepcopy(self.module, {id(module): module for module in modules})
        for name in unused:
            copied.set_submodule(name, nn.Identity())
        return copied

    def _part(self, layer: int) -> list[str]:
        """Return the modules after layer ``layer`` - 1 up to layer ``layer``; after the last, the rest."""
        ends = [self._chain.index(name) + 1 for name, _ in self._layers]
        start, end = [*pairwise([0, *ends, len(self._chain)])][layer]
        return self._chain[start:end]

    def _pass(self, state: Tensor, names: Sequence[str]) -> Tensor:
        state = state.contiguous(memory_format=self.memory_format)
        for name in names:
            state = self.module.get_submodule(name)(state)
        return state


class ModifiedResNetTower(ConvolutionalTower):
    """open_clip's ``ModifiedResNet``: a stem of three convolutions, four stages and an attention pool."""

    @property
    def _chain(self) -> list[str]:
        stem = [f"{part}{number}" for number in (1, 2, 3) for part in ("conv", "bn", "act")]
        return [*stem, "avgpool", "layer1", "layer2", "layer3", "layer4"]

    @property
    def _layers(self) -> list[tuple[str, int]]:
        return [("avgpool", 4), ("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32)]

    def _finish(self, maps: Tensor) -> Tensor:
        return self.module.attnpool(maps)

    @property
    def first_conv(self) -> str:
        """See ``ImageTower.first_conv``."""
        return "conv1"


class TimmConvTower(ConvolutionalTower):
    """A convolutional net of timm whose stages follow each other: the classes of CHAINS."""

    @property
    def _trunk(self) -> Any:
        return self.module.trunk

    @property
    def _chain(self) -> list[str]:
        names: list[str] = []
        for name in CHAINS[type(self._trunk).__name__]:
            if name.endswith("."):
                names += [
                    f"trunk.{name}{part}" for part, _ in getattr(self._trunk, name[:-1]).named_children()
                ]
            else:
                names.append(f"trunk.{name}")
        return names

    @property
    def _layers(self) -> list[tuple[str, int]]:
        named = ((f"trunk.{layer['module']}", layer["reduction"]) for layer in self._trunk.feature_info)
        return [(name, pixels) for name, pixels in named if name in self._chain]

    def _finish(self, maps: Tensor) -> Tensor:
        return self.module.head(self._trunk.forward_head(maps))

    @property
    def first_conv(self) -> str:
        """See ``ImageTower.first_conv``."""
        return f"trunk.{self._trunk.pretrained_cfg['first_conv']}"
