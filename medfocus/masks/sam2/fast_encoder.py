"""Encode images as SAM2's image encoder does, up to rounding, with less work per image.

SAM2's encoder (arXiv 2408.00714) computes a positional encoding of every level, which only video uses, and
enlarges the same positional embedding for every image. It also projects its finest levels to d channels, and
the decoder projects the result to fewer channels. Here the embedding is computed once, and one 1x1
convolution replaces both projections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medfocus.masks.sam2.segmenter import EncodedImages

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

FOLDED = 2  # number of finest levels (S/4, S/8), whose two projections become one


class FastEncoder:
    """An encoder of pixels for the mask decoder, like ``Sam2Segmenter.encode``."""

    def __init__(self, model: SAM2Base) -> None:
        """Prepare a trained ``model`` on its device; ``fits`` must hold for it. A GPU runs it in bfloat16."""
        self.model = model
        # Typed Any, because the sam2 package declares these parts as plain nn.Module.
        encoder: Any = model.image_encoder
        decoder: Any = model.sam_mask_decoder
        self._trunk, self._neck = encoder.trunk, encoder.neck
        side = model.image_size // self._trunk.patch_embed.proj.stride[0]
        with torch.inference_mode():
            self._position = self._trunk._get_pos_embed((side, side))  # (1, S/4, S/4, W)
            self._narrow = [
                _merged(self._neck.convs[len(self._neck.convs) - 1 - level].conv, narrow)
                for level, narrow in enumerate((decoder.conv_s0, decoder.conv_s1))
            ]

    def __call__(self, pixels: Tensor) -> EncodedImages:
        """Encode normalised pixels (B, 3, S, S) of the predictor's transforms."""
        half = pixels.device.type == "cuda"
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
            levels = self._levels(pixels)
            coarse = None
            for level in range(len(levels) - 1, FOLDED - 1, -1):
                coarse = self._mixed(level, levels[level], coarse)
            fine = [F.linear(levels[i], *self._narrow[i]) for i in range(FOLDED)]  # (B, h, w, d/8), d/4
        assert coarse is not None
        embedding = coarse.float()  # (B, d, S/16, S/16)
        if self.model.directly_add_no_mem_embed:
            embedding = embedding + self.model.no_mem_embed.view(1, -1, 1, 1)
        return EncodedImages(embedding, tuple(level.float().permute(0, 3, 1, 2) for level in fine))

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        """Return the output of each stage: (B, S/4, S/4, W), (B, S/8, S/8, 2W), ..."""
        x = self._trunk.patch_embed(pixels) + self._position
        levels = []
        for i, block in enumerate(self._trunk.blocks):
            x = block(x)
            if i in self._trunk.stage_ends:
                levels.append(x)
        return levels

    def _mixed(self, level: int, x: Tensor, above: Tensor | None) -> Tensor:
        """Compute a level (B, d, h, w) of the neck from a stage's output (B, h, w, W) and the level above."""
        lateral = self._neck.convs[len(self._neck.convs) - 1 - level](x.permute(0, 3, 1, 2))
        if above is None or level not in self._neck.fpn_top_down_levels:
            return lateral
        mode = self._neck.fpn_interp_model
        corners = None if mode == "nearest" else False
        mixed = lateral + F.interpolate(above.float(), scale_factor=2.0, mode=mode, align_corners=corners)
        return mixed / 2 if self._neck.fuse_type == "avg" else mixed


def _merged(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Merge two 1x1 convolutions, W -> d -> c, into one: weights (c, W), bias (c,)."""
    narrow = second.weight.flatten(1).double()  # (c, d)
    weight = narrow @ first.weight.flatten(1).double()
    bias = narrow @ first.bias.double() + second.bias.double()
    return weight.float(), bias.float()
