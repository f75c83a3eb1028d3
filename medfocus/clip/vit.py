"""Use parts of open_clip's VisionTransformer: its trainable tail, and a cache of its activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

    from medfocus.clip.regions import Region


@dataclass(eq=False)
class ActivationCache:
    """The activations of the last batch, for further calls with the same batch.

    It keeps tokens only at depths that some call has requested, to save memory. The first request for a depth
    costs one more pass of its batch.
    """

    depths: set[int] = field(default_factory=set)  # 0: before the first block; n: after block n
    views: np.ndarray | Tensor | None = None  # (B, S, S, C) uint8
    pixels: Tensor | None = None  # the preprocessed views
    tokens: dict[int, list[Tensor]] = field(default_factory=dict)  # depth -> (B, L, W) of each image
    described: dict[int, Tensor] = field(default_factory=dict)  # grid -> the segmenter's features (B, P)

    def turn_to(self, views: np.ndarray | Tensor) -> None:
        """Forget the last batch unless ``views`` is the same object."""
        if self.views is not views:
            self.views, self.pixels, self.tokens, self.described = views, None, {}, {}


class Tail(nn.Module):
    """The end of open_clip's VisionTransformer: its last blocks, pooling and projection."""

    def __init__(self, tower: VisionTransformer, region: Region) -> None:
        """Wrap ``tower``, without patch embedding and earlier blocks, for the tokens of ``region``."""
        super().__init__()
        self.tower = tower
        self.region = region

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn tokens (B, ...) of ``ClipEncoder.trunk`` into image features (B, D), each of length one."""
        images, mask = self.region.unpack(tokens, self.tower)
        return self.region.merge(
            [pooled(self.tower, self.tower.transformer(image, attn_mask=mask)) for image in images]
        )


def pooled(visual: VisionTransformer, tokens: Tensor) -> Tensor:
    """Pool tokens (B, L, W) after the last block to image features (B, D), each of length one."""
    summary, _ = visual._pool(tokens)
    assert visual.proj is not None  # only open_clip's pruned towers have none
    return normalize(summary @ visual.proj, dim=-1)


def as_vit(tower: object) -> VisionTransformer | None:
    """Return an image encoder if it is open_clip's VisionTransformer, else None."""
    from open_clip.transformer import VisionTransformer

    return tower if isinstance(tower, VisionTransformer) else None
