"""A convolutional trunk for SAM2's image encoder, in place of Hiera."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from medfocus.storage.imagenet import MEAN, STD, TRUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

_SEEN_MEAN, _SEEN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as SAM2's transforms normalise


class ConvTrunk(nn.Module):
    """timm's EfficientNet-Lite0 as a trunk: pixels (B, 3, S, S) -> maps at S/4, S/8, S/16 and S/32.

    The sam2 package's ``ImageEncoder`` takes any trunk that has ``channel_list`` and returns its maps from
    fine to coarse. Normalisation layers keep their statistics, also in training.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.net: Any = timm.create_model(TRUNK, features_only=True, out_indices=(1, 2, 3, 4))
        self.channel_list: list[int] = list(reversed(self.net.feature_info.channels()))
        # SAM2's transforms have normalised the pixels; the network wants its own mean and deviation.
        self._scale = [seen / own for seen, own in zip(_SEEN_STD, STD, strict=True)]
        self._shift = [
            (seen - own) / std for seen, own, std in zip(_SEEN_MEAN, MEAN, STD, strict=True)
        ]

    def forward(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return the maps (B, C, S/4, S/4) to (B, C, S/32, S/32)."""
        shape = (3, 1, 1)
        scale, shift = pixels.new_tensor(self._scale).view(shape), pixels.new_tensor(self._shift).view(shape)
        return self.net(pixels * scale + shift)

    def train(self, mode: bool = True) -> ConvTrunk:
        """Set the mode of every part but the normalisation layers."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
