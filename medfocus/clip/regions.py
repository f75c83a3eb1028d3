"""Define the kinds of region that an image encoder can use with the image: alpha, attention and dual.

Each kind is a class, which defines its channels of a view, how it packs tokens and how it merges features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


@dataclass(frozen=True)
class Region:
    """The base of all kinds, and the absence of a region: the encoder takes the RGB channels alone."""

    attention_bias: float = 0.0  # β of AttentionRegion; the others ignore it

    name: ClassVar[str | None] = None
    needs_vit: ClassVar[bool] = False
    has_focused_image: ClassVar[bool] = False  # channels after RGB: the focused image if True, else the mask
    sees_one_rgb: ClassVar[bool] = True  # the patch embedding takes one RGB image

    @property
    def key(self) -> str:
        """The part of cache keys that identifies this region."""
        return f"{self.name} 0.0"

    def adapt(self, model: nn.Module) -> nn.Module:
        """Return the open_clip model that this region needs."""
        return model

    def added_layer(self, model: nn.Module) -> nn.Module | None:
        """Return the layer that ``adapt`` added to the model, or None."""
        return None

    def original_name(self, weight: str) -> str | None:
        """Return a weight's name before ``adapt``, or None if ``adapt`` added the weight."""
        return weight

    def images(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return the inputs of the image encoder in pixels (B, C, S, S)."""
        return (pixels[:, :3],)

    def attention_mask(self, visual: VisionTransformer, pixels: Tensor) -> Tensor | None:
        """Return the additive attention mask of every block, (B * heads, L, L), or None."""
        return None

    def pack(self, tokens: Sequence[Tensor], visual: VisionTransformer, pixels: Tensor) -> Tensor:
        """Join the tokens (B, L, W) of each image into one tensor for ``unpack``."""
        return tokens[0]

    def unpack(self, packed: Tensor, visual: VisionTransformer) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the tokens of each image and the attention mask, from the result of ``pack``."""
        return (packed,), None

    def merge(self, features: Sequence[Tensor]) -> Tensor:
        """Merge the features (B, D) of each image into features (B, D), each of length one."""
        return features[0]


class AlphaRegion(Region):
    """A region in a fourth input channel of the patch embedding (Alpha-CLIP, arXiv 2312.03818)."""

    name = "alpha"
    needs_vit = True
    sees_one_rgb = False

    def adapt(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with an ``AlphaConv`` as patch embedding."""
        adapted: Any = copy.deepcopy(model)
        adapted.visual.conv1 = AlphaConv(adapted.visual.conv1)
        return adapted

    def added_layer(self, model: nn.Module) -> nn.Module | None:
        """Return the convolution of the fourth channel."""
        visual: Any = model.visual
        return visual.conv1.alpha

    def original_name(self, weight: str) -> str | None:
        """Undo the renaming of the patch embedding's weights by ``adapt``."""
        if weight.startswith("visual.conv1.alpha."):
            return None
        return weight.replace("visual.conv1.conv.", "visual.conv1.")

    def images(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return all four channels as one input."""
        return (pixels,)


class AttentionRegion(Region):
    """A region that the class token attends to more: every block adds β to the logits of its patches."""

    name = "attention"
    needs_vit = True

    @property
    def key(self) -> str:
        """The name and β."""
        return f"{self.name} {self.attention_bias}"

    def attention_mask(self, visual: VisionTransformer, pixels: Tensor) -> Tensor | None:
        """Return β times the coverage of each patch, for the class token; None for β = 0."""
        if not self.attention_bias:
            return None
        return class_token_bias(self._coverage(visual, pixels), self.attention_bias, _heads(visual))

    def pack(self, tokens: Sequence[Tensor], visual: VisionTransformer, pixels: Tensor) -> Tensor:
        """Append the coverage of the patches to the tokens, (B, L + 1, W), unless β is 0."""
        return pack(tokens[0], self._coverage(visual, pixels)) if self.attention_bias else tokens[0]

    def unpack(self, packed: Tensor, visual: VisionTransformer) -> tuple[Sequence[Tensor], Tensor | None]:
        """Split the coverage from the tokens and turn it into the attention mask."""
        if not self.attention_bias:
            return (packed,), None
        tokens, coverage = unpack(packed)
        return (tokens,), class_token_bias(coverage, self.attention_bias, _heads(visual))

    def _coverage(self, visual: VisionTransformer, pixels: Tensor) -> Tensor:
        return patch_coverage(pixels[:, 3:], visual.conv1.kernel_size[0])


class DualRegion(Region):
    """A region in a second, focused image; the features are the sum of both images' features."""

    name = "dual"
    has_focused_image = True
    sees_one_rgb = False

    def images(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return the image and the focused image from six channels."""
        return pixels.split(3, dim=1)

    def pack(self, tokens: Sequence[Tensor], visual: VisionTransformer, pixels: Tensor) -> Tensor:
        """Concatenate the tokens of both images, (B, 2 L, W)."""
        return torch.cat(list(tokens), dim=1)

    def unpack(self, packed: Tensor, visual: VisionTransformer) -> tuple[Sequence[Tensor], Tensor | None]:
        """Split the tokens of both images."""
        return packed.chunk(2, dim=1), None

    def merge(self, features: Sequence[Tensor]) -> Tensor:
        """Add the features of both images and normalise the sum."""
        return normalize(features[0] + features[1], dim=-1)


REGIONS: dict[str, type[Region]] = {"alpha": AlphaRegion, "attention": AttentionRegion, "dual": DualRegion}


class AlphaConv(nn.Module):
    """A patch embedding with a fourth channel for the region: conv(RGB) + alpha(region).

    ``alpha`` starts at zero, so a region has no effect on the features until it is trained.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        size, stride = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1])
        self.alpha = nn.Conv2d(1, conv.out_channels, size, stride, bias=False)
        nn.init.zeros_(self.alpha.weight)
        self.alpha.to(conv.weight.device).requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pixels (B, 4, S, S) as patches (B, W, G, G)."""
        return self.conv(pixels[:, :3]) + self.alpha(pixels[:, 3:])


def patch_coverage(region: Tensor, patch: int) -> Tensor:
    """Return the share (B, L - 1) of each patch, row by row, inside a region (B, 1, S, S) in [0, 1]."""
    return avg_pool2d(region, patch).flatten(1)


def class_token_bias(coverage: Tensor, strength: float, heads: int) -> Tensor:
    """Return an additive attention mask: β m from the class token to each patch, 0 elsewhere.

    Args:
        coverage: (B, L - 1), the share m of each patch inside the region.
        strength: β.
        heads: Number of attention heads; all use the same mask.

    Returns:
        (B * heads, L, L), as ``nn.MultiheadAttention`` takes its ``attn_mask``.
    """
    count, patches = coverage.shape
    bias = coverage.new_zeros(count, patches + 1, patches + 1)
    bias[:, 0, 1:] = strength * coverage
    return bias.repeat_interleave(heads, dim=0)


def pack(tokens: Tensor, coverage: Tensor) -> Tensor:
    """Append coverage (B, L - 1) to tokens (B, L, W) as one more token: (B, L + 1, W)."""
    row = tokens.new_zeros(len(tokens), 1, tokens.shape[2])
    row[:, 0, : coverage.shape[1]] = coverage
    return torch.cat([tokens, row], dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, L, W) and the coverage (B, L - 1) that ``pack`` joined."""
    tokens = packed[:, :-1]
    return tokens, packed[:, -1, : tokens.shape[1] - 1]


def _heads(visual: VisionTransformer) -> int:
    """Return the number of attention heads of each block."""
    return visual.transformer.resblocks[0].attn.num_heads  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]
