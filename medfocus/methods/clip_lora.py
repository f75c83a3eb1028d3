"""CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): low-rank updates in both towers.

The logits are s I Tᵀ of the updated towers, and the loss is their cross-entropy. As in the public code the
class texts are those of the first template alone and are encoded anew at every step, and the number of steps
grows with the shots. The published settings are the same for every data set. Where ``max_steps`` cuts the
training short, the published learning rate may be too small to move anything: then give several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from medfocus.clip.lora import LoraTowers, check_lora
from medfocus.learning.method import IMAGES, Support
from medfocus.learning.training import train

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


@dataclass
class ClipLora:
    """Trains W + (α/√r) B A for q, k and v in every block of both towers."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = True
    encoder: ClipEncoder
    rank: int  # r
    alpha: float  # α
    dropout: float  # on the input of the low-rank path
    steps_per_shot: int  # optimisation steps for each image that a class has on average ...
    max_steps: int  # ... and never more than these; one epoch is always made
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
    def embedding(self) -> str:
        """Nothing is frozen: the images themselves."""
        return IMAGES

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8, as they are."""
        return images

    def epochs(self, images: int, classes: int) -> int:
        """Whole passes over so many images that make the wished steps, rounded down and at least one."""
        steps = min(self.steps_per_shot * images / classes, self.max_steps)
        return max(1, int(steps / math.ceil(images / self.batch_size)))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train the updates on images and texts.

        Raises ValueError where the support brings no prompts, or as ``LoraTowers`` does.
        """
        if not support.prompts:
            raise ValueError(
                "clip-lora: it trains the text tower, but support.prompts is empty. Give the texts of each "
                "class."
            )
        images, labels = support.inputs, support.labels  # (V, N, S, S, C), (N,)
        texts = [ensemble[0] for ensemble in support.prompts]  # (K,)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            features = towers(images[view, index])  # (B, D)
            logits = self.encoder.logit_scale * features @ towers.encode_texts(texts).T  # (B, K)
            return functional.cross_entropy(logits, labels[index])

        with torch.random.fork_rng(devices=[]):  # of A's start and the dropout
            torch.manual_seed(generator.initial_seed())
            towers = self._untrained()
            train(
                towers.parameters(),
                loss,
                labels,
                views=len(images),
                epochs=self.epochs(len(labels), len(texts)),
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
                generator=generator,
            )
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
        return {"text": self.encoder.logit_scale * features @ self.text_features_.T}

    def state(self) -> dict[str, Tensor]:
        """The low-rank factors and the class texts."""
        updates = {f"towers.{name}": value for name, value in self.towers_.state_dict().items()}
        return {"text_features": self.text_features_, **updates}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.towers_ = self._untrained().eval()
        self.towers_.load_state_dict(
            {k.removeprefix("towers."): v for k, v in state.items() if k.startswith("towers.")}
        )
        return self
