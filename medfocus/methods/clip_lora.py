"""CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): low-rank updates in both towers.

The logits are s I Tᵀ of the updated towers; the loss is their cross-entropy. As in the public code, the
prompts are those of the first template, every step encodes them again, and the number of steps grows with the
shots. The published settings are the same for every dataset.

Deviations from the public code: its random crops keep 8 % of the image or more. Here all methods share cached
crops of at least half of the image, because a smaller crop can lose the lesion. Its cosine ends at a learning
rate of 1e-6, and here at 0; the difference is half a percent of the initial rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from medfocus.clip.lora import LoraTowers, check_lora
from medfocus.learning.towers import TowersMethod


@dataclass
class ClipLora(TowersMethod):
    """Trains W + (α/√r) B A for q, k and v in every block of both towers."""

    name: ClassVar[str] = "clip-lora"
    rank: int  # r
    alpha: float  # α
    dropout: float  # on the input of the low-rank path
    steps_per_shot: int  # optimisation steps per training image of an average class

    def __post_init__(self) -> None:
        check_lora(self.name, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        self.check("steps_per_shot")

    def epochs_for(self, images: int, classes: int) -> int:
        """Return the number of whole epochs that fit into the wanted steps, at least one."""
        steps = self.steps_per_shot * images / classes
        return max(1, int(steps / math.ceil(images / self.batch_size)))

    def untrained(self) -> LoraTowers:
        """See ``TowersMethod.untrained``. Raises as ``LoraTowers`` does."""
        return LoraTowers(self.encoder, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
