"""Add low-rank updates to CLIP's attention: CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541).

In every block of both towers the projections to q, k and v become W + (α/√r) B A, with r rows in A. W stays
frozen; A and B train. ``medfocus.clip.towers.low_rank`` has the formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from medfocus.clip.towers.low_rank import LowRank
from medfocus.clip.trained_towers import TrainedTowers

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


class LoraTowers(TrainedTowers):
    """Both towers of a frozen CLIP with low-rank updates of every attention."""

    def __init__(self, encoder: ClipEncoder, *, rank: int, alpha: float, dropout: float) -> None:
        """Add an update to the attention of every block in a copy of ``encoder``'s towers.

        Raises TowerError if a tower has no such attention.
        """
        encoder.require(("projections",), "low-rank updates")
        super().__init__(encoder)
        self.updates = nn.ModuleList()
        for tower in self.towers():
            for block in tower.blocks():
                update = LowRank(block.width, rank=rank, alpha=alpha, dropout=dropout)
                self.updates.append(update.to(block.weights()[0].matrices()))
                block.add(update)
