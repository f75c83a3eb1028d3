"""The parts of open_clip's VisionTransformer: its end, which may train, and what a batch left on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medfocus.clip.regions import class_token_bias, unpack

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


@dataclass(eq=False)
class ActivationCache:
    """The last batch that went through the image encoder, for whoever asks for more of the same batch.

    It keeps the tokens of those places alone that were asked for once, so that of a deep tower not every
    layer stays in memory; a place that is new costs one more pass, at its first batch.
    """

    places: set[int] = field(default_factory=set)  # 0: before the first block; n: behind block n
    views: np.ndarray | Tensor | None = None  # (B, S, S, C) uint8
    pixels: Tensor | None = None  # what they were made into
    tokens: dict[int, Tensor] = field(default_factory=dict)  # place -> (B, L, W)
    described: dict[int, Tensor] = field(default_factory=dict)  # grid -> the segmenter's features (B, P)

    def turn_to(self, views: np.ndarray | Tensor) -> None:
        """Forget the last batch, if it is another."""
        if self.views is not views:
            self.views, self.pixels, self.tokens, self.described = views, None, {}, {}


class Tail(nn.Module):
    """The end of open_clip's VisionTransformer: its last blocks, pooling and projection."""

    def __init__(
        self, tower: VisionTransformer, images: int = 1, attention_bias: float | None = None
    ) -> None:
        """Wrap ``tower``, whose patch embedding and earlier blocks have been taken out.

        Args:
            tower: See there.
            images: Whose tokens come one behind the other, and whose embeddings are added.
            attention_bias: β, where a last token carries the region's coverage.
        """
        super().__init__()
        self.tower = tower
        self.images = images
        self.attention_bias = attention_bias

    def forward(self, tokens: Tensor) -> Tensor:
        """What ``ClipEncoder.trunk`` gave (B, ...) -> image features (B, D), each of length one."""
        bias = None
        if self.attention_bias is not None:
            tokens, coverage = unpack(tokens)
            bias = class_token_bias(coverage, self.attention_bias, heads(self.tower))
        parts = [
            pooled(self.tower, self.tower.transformer(part, attn_mask=bias))
            for part in tokens.chunk(self.images, dim=1)
        ]
        return parts[0] if len(parts) == 1 else normalize(torch.stack(parts).sum(dim=0), dim=-1)


def pooled(visual: VisionTransformer, tokens: Tensor) -> Tensor:
    """Tokens (B, L, W) behind the last block -> image features (B, D), each of length one."""
    summary, _ = visual._pool(tokens)
    assert visual.proj is not None  # only open_clip's pruned towers have none
    return normalize(summary @ visual.proj, dim=-1)


def as_vit(tower: object) -> VisionTransformer | None:
    """An image encoder, if it is open_clip's VisionTransformer; the others have no blocks to stop at."""
    from open_clip.transformer import VisionTransformer

    return tower if isinstance(tower, VisionTransformer) else None


def heads(visual: VisionTransformer) -> int:
    """How many attention heads each block has."""
    return visual.transformer.resblocks[0].attn.num_heads  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]
