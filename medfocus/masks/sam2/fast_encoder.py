"""SAM2's image encoder without what only video reads, and with what no image changes made once.

The encoder (arXiv 2408.00714) also gives every level a positional encoding, which the mask decoder for
images never reads, enlarges the same embedding of positions for every image, and brings its finest levels
to the width d only to have the decoder narrow them again: two convolutions of one pixel in a row, which are
one. Up to rounding nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medfocus.masks.sam2.segmenter import Features

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

FOLDED = 2  # the levels at S/4 and S/8, which the mask decoder narrows


class FastEncoder:
    """Pixels -> what the mask decoder takes, as ``Sam2Segmenter.encode`` has it from ``model``."""

    def __init__(self, model: SAM2Base) -> None:
        """``model`` is trained and on its device; ``segmenter.fits`` says which will do.

        On a GPU it runs in bfloat16.
        """
        self.model = model
        # Typed Any: the sam2 package's modules declare their parts as plain nn.Module.
        encoder: Any = model.image_encoder
        decoder: Any = model.sam_mask_decoder
        self._trunk, self._neck = encoder.trunk, encoder.neck
        side = model.image_size // self._trunk.patch_embed.proj.stride[0]
        with torch.inference_mode():
            self._position = self._trunk._get_pos_embed((side, side))  # (1, S/4, S/4, W)
            self._narrow = [
                _in_a_row(self._neck.convs[len(self._neck.convs) - 1 - level].conv, narrow)
                for level, narrow in enumerate((decoder.conv_s0, decoder.conv_s1))
            ]

    def __call__(self, pixels: Tensor) -> Features:
        """Normalised pixels (B, 3, S, S), as the predictor's transforms give them."""
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
        return Features(embedding, tuple(level.float().permute(0, 3, 1, 2) for level in fine))

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        """The stages' ends, (B, S/4, S/4, W), (B, S/8, S/8, 2W), ..."""
        x = self._trunk.patch_embed(pixels) + self._position
        levels = []
        for i, block in enumerate(self._trunk.blocks):
            x = block(x)
            if i in self._trunk.stage_ends:
                levels.append(x)
        return levels

    def _mixed(self, level: int, x: Tensor, above: Tensor | None) -> Tensor:
        """The neck's level (B, d, h, w) of a stage's end (B, h, w, W) and the level above it."""
        own = self._neck.convs[len(self._neck.convs) - 1 - level](x.permute(0, 3, 1, 2))
        if above is None or level not in self._neck.fpn_top_down_levels:
            return own
        mode = self._neck.fpn_interp_model
        corners = None if mode == "nearest" else False
        mixed = own + F.interpolate(above.float(), scale_factor=2.0, mode=mode, align_corners=corners)
        return mixed / 2 if self._neck.fuse_type == "avg" else mixed


def _in_a_row(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Two convolutions of one pixel, W -> d -> c, as one: weights (c, W), bias (c,)."""
    narrow = second.weight.flatten(1).double()  # (c, d)
    weight = narrow @ first.weight.flatten(1).double()
    bias = narrow @ first.bias.double() + second.bias.double()
    return weight.float(), bias.float()
