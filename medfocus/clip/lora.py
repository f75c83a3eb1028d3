"""Low-rank updates of CLIP's attention: CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541).

In every block of both towers the projections to q, k and v become W + (α/√r) B A, with r rows in A. W stays
frozen; A and B train. As in the public code the low-rank path has a dropout on its input, of its own for each
of q, k and v, A starts as PyTorch's linear layers do and B at zero, so that the start is the frozen model.
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
    """Raise ValueError, in the name of ``method``, for settings that make no update."""
    if rank < 1:
        raise ValueError(f"{method}: the LoRA rank is {rank}; use 1 or more.")
    if alpha <= 0:
        raise ValueError(f"{method}: the LoRA alpha is {alpha}; use a value above 0.")
    if not 0 <= dropout < 1:
        raise ValueError(f"{method}: the LoRA dropout is {dropout}; use a share in [0, 1).")


class LowRank(nn.Module):
    """(α/√r) B A dropout(x) for q, k and v of one attention: all that trains, and all that a state holds."""

    def __init__(self, width: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(3, rank, width))  # A of q, k and v
        self.up = nn.Parameter(torch.zeros(3, width, rank))  # B of q, k and v
        nn.init.uniform_(self.down, -(width**-0.5), width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, W) -> what is added to their q, k and v, side by side (B, L, 3 W)."""
        parts = [self.dropout(x) @ a.T @ b.T for a, b in zip(self.down, self.up, strict=True)]
        return self.scale * torch.cat(parts, dim=-1)


class LoraAttention(nn.Module):
    """Stands in a block for its ``nn.MultiheadAttention``, as open_clip's blocks call that."""

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
        """Self-attention of tokens (B, L, W) -> (B, L, W), and no weights.

        Args:
            query: The tokens.
            key: The tokens again; open_clip's towers attend to themselves alone.
            value: The tokens again.
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
    """Both towers of a frozen CLIP with low-rank updates; its parameters and its state are these alone.

    Where the encoder looks at a region by "alpha", that channel of the patch embedding trains with them.

    The encoder given is left as it was: its modules are copied, its frozen weights shared.
    """

    def __init__(self, encoder: ClipEncoder, *, rank: int, alpha: float, dropout: float) -> None:
        """Add updates to every attention of ``encoder``'s towers.

        Raises ValueError where a tower is none of open_clip's own transformers.
        """
        super().__init__()
        alpha_channel = [
            p for n, p in encoder.model.named_parameters() if n.startswith("visual.conv1.alpha.")
        ]
        own = set(map(id, alpha_channel))  # the one new weight that is no update, of the region "alpha"
        shared = {id(weight): weight for weight in encoder.model.parameters() if id(weight) not in own}
        model = copy.deepcopy(encoder.model, shared)
        self.updates = nn.ModuleList()
        for block in _blocks(encoder.name, model):
            frozen: nn.MultiheadAttention = block.attn  # pyright: ignore[reportAssignmentType]
            update = LowRank(frozen.embed_dim, rank=rank, alpha=alpha, dropout=dropout)
            self.updates.append(update.to(frozen.out_proj.weight))
            block.attn = LoraAttention(frozen, update)
        if own:
            self.alpha = model.visual.conv1.alpha.requires_grad_(True)  # pyright: ignore[reportAttributeAccessIssue]
        self.encoder = replace(encoder, model=model)  # no nn.Module, so the towers stay out of the state

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> image features (B, D) on the CPU, each of length one."""
        return self.encoder.image_features(self.encoder.preprocess(images)).cpu()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts (N) -> text features (N, D) on the CPU, each of length one, with their gradient."""
        tokens = self.encoder.tokenizer(texts).to(self.encoder.device)  # (N, context)
        return self.encoder.model.encode_text(tokens, normalize=True).cpu()  # pyright: ignore[reportCallIssue]


def _blocks(name: str, model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the image encoder and of the text tower, in this order."""
    found: list[nn.Module] = []
    # CLIP keeps its text tower's parts among its own, CustomTextCLIP keeps a tower.
    for what, tower in (("image", model.visual), ("text", getattr(model, "text", model))):
        blocks = list(getattr(getattr(tower, "transformer", None), "resblocks", []))
        if not blocks or not all(
            isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks
        ):
            raise ValueError(
                f"{name}: its {what} tower is {type(tower).__name__}, without the attention blocks that "
                "low-rank updates go into. Take a CLIP whose towers are both open_clip's transformers, such "
                "as ViT-B-32, or another method."
            )
        found += blocks
    return found
