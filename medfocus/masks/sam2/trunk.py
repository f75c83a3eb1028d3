"""A convolutional trunk for SAM2's image encoder, in place of Hiera."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import layer_norm

from medfocus.storage.imagenet import MEAN, STD, TRUNK

_SEEN_MEAN, _SEEN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as SAM2's transforms normalise


class ConvTrunk(nn.Module):
    """timm's EfficientNet-Lite0 as a trunk: pixels (B, 3, S, S) -> maps at S/4, S/8, S/16 and S/32.

    The sam2 package's ``ImageEncoder`` takes any trunk that has ``channel_list`` and returns its maps from
    fine to coarse. Normalisation layers keep their statistics, also in training. The maps are normalised
    over their channels: SAM2 adds positions of size one to them, and much larger maps would drown the
    positions, so that the decoder could not tell where a point lies.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.net: Any = timm.create_model(TRUNK, features_only=True, out_indices=(1, 2, 3, 4))
        self.channel_list: list[int] = list(reversed(self.net.feature_info.channels()))
        self._ends = {info["stage"] for info in self.net.feature_info.get_dicts()}  # stages that give a map
        # SAM2's transforms have normalised the pixels; the network wants its own mean and deviation.
        self._scale = [seen / own for seen, own in zip(_SEEN_STD, STD, strict=True)]
        self._shift = [(seen - own) / std for seen, own, std in zip(_SEEN_MEAN, MEAN, STD, strict=True)]

    @property
    def inputs(self) -> list[tuple[int, int]]:
        """The channels and the stride of the input of each stage, from fine to coarse."""
        stride, found = self.net.conv_stem.stride[0], []
        for stage in self.net.blocks:
            convolutions = [module for module in stage[0].modules() if isinstance(module, nn.Conv2d)]
            found.append((convolutions[0].in_channels, stride))
            stride *= stage[0].conv_dw.stride[0]
        return found

    def forward(
        self, pixels: Tensor, before: Callable[[int, Tensor], Tensor] = lambda stage, x: x
    ) -> Sequence[Tensor]:
        """Return the maps (B, C, S/4, S/4) to (B, C, S/32, S/32).

        ``before`` receives each stage's number and input (B, C, h, w), and returns the input to use.
        """
        shape = (3, 1, 1)
        scale, shift = pixels.new_tensor(self._scale).view(shape), pixels.new_tensor(self._shift).view(shape)
        x, maps = self.net.bn1(self.net.conv_stem(pixels * scale + shift)), []
        for number, stage in enumerate(self.net.blocks):
            x = stage(before(number, x))
            if number + 1 in self._ends:
                maps.append(_unit(x))
        return maps

    def train(self, mode: bool = True) -> ConvTrunk:
        """Set the mode of every part but the normalisation layers."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def _unit(maps: Tensor) -> Tensor:
    """Normalise maps (B, C, h, w) over their channels to mean 0 and variance 1."""
    last = maps.permute(0, 2, 3, 1)
    return layer_norm(last, last.shape[-1:]).permute(0, 3, 1, 2)
