"""Add low-rank updates to CLIP's attention: CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541).

In every block of both towers the projections to q, k and v become W + (α/√r) B A, with r rows in A. W stays
frozen; A and B train. ``medfocus.clip.towers.low_rank`` has the formula.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from medfocus.clip.regions import alpha_layer
from medfocus.clip.towers.choose import image_tower, text_tower
from medfocus.clip.towers.low_rank import LowRank

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


class LoraTowers(nn.Module):
    """Both towers of a frozen CLIP with low-rank updates.

    Its parameters and state are the updates and, with the region "alpha", the fourth channel of the first
    convolution. The towers are copies that share their frozen weights with the encoder.
    """

    def __init__(self, encoder: ClipEncoder, *, rank: int, alpha: float, dropout: float) -> None:
        """Add an update to the attention of every block in a copy of ``encoder``'s towers.

        Raises TowerError if a tower has no such attention.
        """
        super().__init__()
        encoder.require(("projections",), "low-rank updates")
        added = alpha_layer(encoder.model)
        trained = set() if added is None else set(map(id, added.parameters()))
        shared = {id(weight): weight for weight in encoder.model.parameters() if id(weight) not in trained}
        model = copy.deepcopy(encoder.model, shared)
        self.updates = nn.ModuleList()
        for tower in (image_tower(model.visual), text_tower(model)):  # pyright: ignore[reportArgumentType]
            for block in tower.blocks():
                update = LowRank(block.width, rank=rank, alpha=alpha, dropout=dropout)
                self.updates.append(update.to(block.weights()[0].matrices()))
                block.add(update)
        if (layer := alpha_layer(model)) is not None:
            self.alpha = layer.requires_grad_(True)
        self.encoder = replace(encoder, model=model)  # not an nn.Module, so the state excludes the towers

    def forward(self, images: Tensor) -> Tensor:
        """Encode views (B, S, S, C) uint8 as image features (B, D) on the CPU, each of length one."""
        return self.encoder.image_features(self.encoder.preprocess(images)).cpu()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts as text features (N, D) on the CPU, each of length one, with a gradient."""
        tokens = self.encoder.tokenizer(texts).to(self.encoder.device)  # (N, context)
        return self.encoder.model.encode_text(tokens, normalize=True).cpu()  # pyright: ignore[reportCallIssue]
