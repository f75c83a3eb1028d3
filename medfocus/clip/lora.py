"""Add low-rank updates to CLIP's attention: CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541).

In every block of both towers the projections to q, k and v become W + (α/√r) B A, with r rows in A. W stays
frozen; A and B train. As in the paper's public code, each of q, k and v has its own dropout on the input of
the low-rank path, A starts like PyTorch's linear layers, and B starts at zero, so that training starts from
the frozen model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


def check_lora(method: str, *, rank: int, alpha: float, dropout: float) -> None:
    """Raise ValueError for settings outside their range; the messages begin with ``method``."""
    if rank < 1:
        raise ValueError(f"{method}: the LoRA rank is {rank}. Use 1 or more.")
    if alpha <= 0:
        raise ValueError(f"{method}: the LoRA alpha is {alpha}. Use a value above 0.")
    if not 0 <= dropout < 1:
        raise ValueError(f"{method}: the LoRA dropout is {dropout}. Use a share in [0, 1).")


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
        parts = [self.dropout(x) @ a.T @ b.T for a, b in zip(self.down, self.up, strict=True)]
        return self.scale * torch.cat(parts, dim=-1)


class LoraAttention(nn.Module):
    """A frozen ``nn.MultiheadAttention`` with low-rank updates, which replaces it in open_clip's blocks."""

    def __init__(self, frozen: nn.MultiheadAttention, low_rank: LowRank) -> None:
        super().__init__()
        self.frozen = frozen
        self.low_rank = low_rank
        self.num_heads = frozen.num_heads

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
        qkv = linear(query, self.frozen.in_proj_weight, self.frozen.in_proj_bias) + self.low_rank(query)
        heads = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, H, W / H)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))  # (B, H, L, L)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.frozen.out_proj(attended.transpose(1, 2).flatten(2)), None


class LoraTowers(nn.Module):
    """Both towers of a frozen CLIP with low-rank updates.

    Its parameters and state are the updates and, with the region "alpha", the fourth channel of the patch
    embedding. The towers are copies that share their frozen weights with the encoder.
    """

    def __init__(self, encoder: ClipEncoder, *, rank: int, alpha: float, dropout: float) -> None:
        """Add an update to every attention in a copy of ``encoder``'s towers.

        Raises ValueError if a tower is not one of open_clip's own transformers.
        """
        super().__init__()
        added = encoder.region.added_layer(encoder.model)
        trained = set() if added is None else set(map(id, added.parameters()))
        shared = {id(weight): weight for weight in encoder.model.parameters() if id(weight) not in trained}
        model = copy.deepcopy(encoder.model, shared)
        self.updates = nn.ModuleList()
        for block in _blocks(encoder.name, model):
            frozen: nn.MultiheadAttention = block.attn  # pyright: ignore[reportAssignmentType]
            update = LowRank(frozen.embed_dim, rank=rank, alpha=alpha, dropout=dropout)
            self.updates.append(update.to(frozen.out_proj.weight))
            block.attn = LoraAttention(frozen, update)
        if (layer := encoder.region.added_layer(model)) is not None:
            self.alpha = layer.requires_grad_(True)
        self.encoder = replace(encoder, model=model)  # not an nn.Module, so the state excludes the towers

    def forward(self, images: Tensor) -> Tensor:
        """Encode views (B, S, S, C) uint8 as image features (B, D) on the CPU, each of length one."""
        return self.encoder.image_features(self.encoder.preprocess(images)).cpu()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts as text features (N, D) on the CPU, each of length one, with a gradient."""
        tokens = self.encoder.tokenizer(texts).to(self.encoder.device)  # (N, context)
        return self.encoder.model.encode_text(tokens, normalize=True).cpu()  # pyright: ignore[reportCallIssue]


def _blocks(name: str, model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of the image encoder and then of the text tower."""
    all_blocks: list[nn.Module] = []
    # CLIP itself holds the parts of its text tower; CustomTextCLIP holds them in ``text``.
    for name_of_tower, tower in (
        ("image encoder", model.visual),
        ("text tower", getattr(model, "text", model)),
    ):
        blocks = list(getattr(getattr(tower, "transformer", None), "resblocks", []))
        if not blocks or not all(
            isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks
        ):
            raise ValueError(
                f"{name}: its {name_of_tower} is {type(tower).__name__}, without the attention blocks that "
                "low-rank updates need. Take a CLIP with open_clip's transformers in both towers, such as "
                "ViT-B-32, or another method."
            )
        all_blocks += blocks
    return all_blocks
