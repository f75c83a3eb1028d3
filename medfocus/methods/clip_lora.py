"""CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): low-rank updates in both towers.

The logits are s I Tᵀ of the updated towers; the loss is their cross-entropy. As in the public code, the
prompts are those of the first template, every step encodes them again, and the number of steps grows with the
shots. The published settings are the same for every dataset. If ``max_steps`` stops training early, the
published learning rate may be too small to have an effect; in this case, give several candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from medfocus.clip.lora import LoraTowers, check_lora
from medfocus.learning.frozen import ImageMethod
from medfocus.learning.method import Support, with_prefix
from medfocus.learning.training import Schedule, seeded, train


@dataclass
class ClipLora(ImageMethod):
    """Trains W + (α/√r) B A for q, k and v in every block of both towers."""

    takes_views: ClassVar[bool] = True
    rank: int  # r
    alpha: float  # α
    dropout: float  # on the input of the low-rank path
    steps_per_shot: int  # optimisation steps per training image of an average class
    max_steps: int  # upper bound on optimisation steps; the first epoch always runs in full
    batch_size: int
    lr: float
    weight_decay: float
    towers_: LoraTowers = field(init=False, repr=False)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D) of the updated text tower

    def __post_init__(self) -> None:
        check_lora("clip-lora", rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        for name in ("steps_per_shot", "max_steps"):
            if (steps := getattr(self, name)) < 1:
                raise ValueError(f"clip-lora: {name} is {steps}; use 1 or more.")

    @property
    def needs_towers(self) -> bool:
        """See ``Method.needs_towers``."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``Method.needs``."""
        return ("projections",)

    def epochs(self, images: int, classes: int) -> int:
        """Return the number of whole epochs that fit into the wanted steps, at least one."""
        steps = min(self.steps_per_shot * images / classes, self.max_steps)
        return max(1, int(steps / math.ceil(images / self.batch_size)))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train the updates on images and prompts.

        Raises ValueError if the support has no prompts, or as ``LoraTowers`` does.
        """
        if not support.prompts:
            raise ValueError(
                "clip-lora: fit trains the text tower, but support.prompts is empty. Give the prompts of "
                "each class."
            )
        images, labels = support.inputs, support.labels  # (V, N, S, S, C), (N,)
        texts = [ensemble[0] for ensemble in support.prompts]  # (K,)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            features = towers(images[view, index])  # (B, D)
            logits = self.text_logits(features, towers.encode_texts(texts))  # (B, K)
            return functional.cross_entropy(logits, labels[index])

        with seeded(generator.initial_seed()):  # for the initial A and the dropout
            towers = self._untrained()
            schedule = Schedule(
                epochs=self.epochs(len(labels), len(texts)),
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
            )
            train(towers.parameters(), loss, labels, schedule, views=len(images), generator=generator)
        self.towers_ = towers.eval()
        with torch.no_grad():
            self.text_features_ = towers.encode_texts(texts)
        return self

    def _untrained(self) -> LoraTowers:
        return LoraTowers(self.encoder, rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Images (N, S, S, C) uint8 -> logits (N, K)."""
        features = torch.cat([self.towers_(part) for part in inputs.split(64)])
        return {"text": self.text_logits(features, self.text_features_)}

    def state(self) -> dict[str, Tensor]:
        """Return the low-rank factors and the text features."""
        return {"text_features": self.text_features_, **self.towers_.state_dict(prefix="towers.")}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.towers_ = self._untrained().eval()
        self.towers_.load_state_dict(with_prefix(state, "towers."))
        return self
