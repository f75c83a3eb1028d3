"""What an image encoder needs to look at a region that comes beside the image, not painted into it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

# alpha: the region is a fourth input channel; attention: the class token is drawn to the region's patches;
# dual: the image and its focused twin are encoded both, and their embeddings added.
REGIONS = ("alpha", "attention", "dual")


class AlphaConv(nn.Module):
    """A patch embedding with a fourth channel for the region: conv(RGB) + alpha(region).

    ``alpha`` starts at zero, so that the tower sees what it saw before until it is trained. Source:
    Alpha-CLIP (Sun et al., arXiv 2312.03818).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        size, stride = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1])
        self.alpha = nn.Conv2d(1, conv.out_channels, size, stride, bias=False)
        nn.init.zeros_(self.alpha.weight)
        self.alpha.to(conv.weight.device).requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 4, S, S) -> (B, W, G, G)."""
        return self.conv(pixels[:, :3]) + self.alpha(pixels[:, 3:])


def with_alpha(model: nn.Module) -> nn.Module:
    """A copy of open_clip's CLIP with a ViT whose patch embedding is an ``AlphaConv``."""
    copied = copy.deepcopy(model)
    visual: nn.Module = copied.visual  # pyright: ignore[reportAssignmentType]
    visual.conv1 = AlphaConv(visual.conv1)  # pyright: ignore[reportArgumentType]
    return copied


def patch_coverage(region: Tensor, patch: int) -> Tensor:
    """Region (B, 1, S, S) in [0, 1] -> the share of each patch that it covers, (B, L - 1) row by row."""
    return avg_pool2d(region, patch).flatten(1)


def class_token_bias(coverage: Tensor, strength: float, heads: int) -> Tensor:
    """What is added to the attention logits: β m for the class token's look at each patch, else 0.

    Args:
        coverage: (B, L - 1), the share m of each patch that the region covers.
        strength: β.
        heads: Of the attention; all get the same.

    Returns:
        (B * heads, L, L), as ``nn.MultiheadAttention`` takes its ``attn_mask``.
    """
    count, patches = coverage.shape
    bias = coverage.new_zeros(count, patches + 1, patches + 1)
    bias[:, 0, 1:] = strength * coverage
    return bias.repeat_interleave(heads, dim=0)


def pack(tokens: Tensor, coverage: Tensor) -> Tensor:
    """Tokens (B, L, W), coverage (B, L - 1) -> (B, L + 1, W): the coverage travels as one more token."""
    row = tokens.new_zeros(len(tokens), 1, tokens.shape[2])
    row[:, 0, : coverage.shape[1]] = coverage
    return torch.cat([tokens, row], dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What ``pack`` put together: tokens (B, L, W) and coverage (B, L - 1)."""
    tokens = packed[:, :-1]
    return tokens, packed[:, -1, : tokens.shape[1] - 1]
