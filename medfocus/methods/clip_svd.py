"""CLIP-SVD (Koleilat et al., arXiv 2509.03740): the singular values of both towers' weights train.

The logits are s I Tᵀ of the changed towers; the loss is their cross-entropy, by AdamW. As in the public code,
the prompts are those of one template, every singular value of the attention and of the MLP trains in every
block, and weight decay acts on the singular values themselves. For BiomedCLIP the code trains for 100 epochs
(200 on one data set), with batches of 32, without weight decay, and with a learning rate that is set by hand
for each data set, from 5e-4 to 1e-2. Here, cross-validation inside the support chooses the rate.

Deviations from the public code: its cosine takes a step with each batch but is as long as the number of
epochs, so the rate rises and falls again within a training; here it falls once. Its random crops keep 8 % of
the image or more; here all methods share cached crops of at least half of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from medfocus.clip.svd import SvdTowers
from medfocus.learning.towers import TowersMethod


@dataclass
class ClipSvd(TowersMethod):
    """Trains s in W = U diag(s) Vᵀ for the weights of attention and MLP in every block of both towers."""

    name: ClassVar[str] = "clip-svd"
    epochs: int

    def __post_init__(self) -> None:
        self.check("epochs")

    def epochs_for(self, images: int, classes: int) -> int:
        """See ``TowersMethod.epochs_for``."""
        return self.epochs

    def untrained(self) -> SvdTowers:
        """See ``TowersMethod.untrained``. Raises as ``SvdTowers`` does."""
        return SvdTowers(self.encoder)
