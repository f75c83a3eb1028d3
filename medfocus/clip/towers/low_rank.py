"""Low-rank updates of frozen projections, W + (α/√r) B A: CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541).

As in the paper's public code, each of q, k and v has its own dropout on the input of the low-rank path, A
starts like PyTorch's linear layers, and B starts at zero, so that training starts from the frozen model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class LowRank(nn.Module):
    """The low-rank update of one attention, (α/√r) B A dropout(x) for each of q, k and v."""

    def __init__(self, width: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(3, rank, width))  # A of q, k and v
        self.up = nn.Parameter(torch.zeros(3, width, rank))  # B of q, k and v
        nn.init.uniform_(self.down, -(width**-0.5), width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Compute the updates of q, k and v of tokens (B, L, W), concatenated: (B, L, 3 W)."""
        return torch.cat([self.part(number, x) for number in range(3)], dim=-1)

    def part(self, number: int, x: Tensor) -> Tensor:
        """Compute the update (B, L, W) of q (0), k (1) or v (2)."""
        return self.scale * (self.dropout(x) @ self.down[number].T @ self.up[number].T)


class LoraAttention(nn.Module):
    """A frozen ``nn.MultiheadAttention`` with low-rank updates, which replaces it in open_clip's blocks."""

    def __init__(self, frozen: nn.MultiheadAttention, low_rank: LowRank) -> None:
        super().__init__()
        self.frozen = frozen
        self.low_rank = low_rank
        self.num_heads = frozen.num_heads

    def qkv(self, x: Tensor) -> Tensor:
        """Project tokens (B, L, W) to q, k and v, concatenated: (B, L, 3 W)."""
        return linear(x, self.frozen.in_proj_weight, self.frozen.in_proj_bias) + self.low_rank(x)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Apply self-attention to tokens (B, L, W); return (B, L, W), and None instead of attention weights.

        Args:
            query: The tokens.
            key: The same tokens.
            value: The same tokens.
            need_weights: Always False in open_clip's blocks.
            attn_mask: (L, L) or (B * heads, L, L), added to the attention logits.
        """
        assert query is key is value and not need_weights
        heads = self.qkv(query).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, H, W / H)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))  # (B, H, L, L)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.frozen.out_proj(attended.transpose(1, 2).flatten(2)), None


class LoraLinear(nn.Module):
    """A frozen linear layer with low-rank updates: the projection to one of q, k and v, or to all three."""

    def __init__(self, frozen: nn.Linear, low_rank: LowRank, part: int | None = None) -> None:
        """Update ``frozen`` by part 0 (q), 1 (k) or 2 (v) of ``low_rank``, or by all parts if None."""
        super().__init__()
        self.frozen = frozen
        self.low_rank = low_rank
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens (B, L, W) to (B, L, W), or to (B, L, 3 W)."""
        update = self.low_rank(x) if self.part is None else self.low_rank.part(self.part, x)
        return self.frozen(x) + update
