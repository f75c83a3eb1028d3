"""CLAP (Silva-Rodríguez et al., CVPR 2024, arXiv 2312.12730): a linear probe that stays near the texts.

w starts at the text features and minimises CE(s f·w_k / |w_k|) + (1/K) Σ_k λ_k |w_k - t_k|². λ_k is the mean
zero-shot probability of class k on its own training images: if zero-shot CLIP knows a class, its weights stay
near the text. λ stays as it is at the start, and nothing is chosen on validation data.

As in the public code, the penalty is a mean over classes, t_k has the length of CLIP's raw text features, and
SGD takes 300 epochs with batches of 256, momentum 0.9, and a rate of 0.1 with a cosine after one epoch at
1e-5. Text features have length one here, so ``LENGTH`` gives them the length that this rate and penalty are
made for. Each step draws its views from the cached views; the public code has twenty of each image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.contexts import SgdSchedule, train_sgd
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Support

LENGTH = 10.0  # of a raw text feature of OpenAI's CLIP, about


def multipliers(logits: Tensor, labels: Tensor) -> Tensor:
    """λ_k, the mean zero-shot probability of class k on its images: (M, K), (M,) -> (K,)."""
    own = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]  # (M,)
    totals = torch.zeros(logits.shape[1], dtype=own.dtype).index_add_(0, labels, own)
    return totals / labels.bincount(minlength=logits.shape[1])


def penalty(weight: Tensor, text_features: Tensor, strength: Tensor) -> Tensor:
    """(1/K) Σ_k λ_k |w_k - t_k|²: (K, D), (K, D), (K,) -> scalar."""
    return (strength * (weight - text_features).square().sum(dim=1)).mean()


@dataclass
class Clap(SgdSchedule, FeatureMethod):
    """Trains one weight vector per class."""

    takes_views: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ("weight",)
    weight_: Tensor = field(init=False, repr=False)  # (K, D) L2-normalised

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(
                f"clap: warmup is {self.warmup} epochs of {self.epochs}. Use 0 or more, and fewer than "
                "epochs."
            )

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train the weights on frozen image features."""
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        zero_shot = self.text_logits(features.flatten(0, 1), support.text_features)  # (V N, K)
        strength = multipliers(zero_shot, labels.repeat(len(features)))
        text = LENGTH * support.text_features
        weight = nn.Parameter(text.clone())

        def accumulate(index: Tensor, view: Tensor) -> None:
            logits = self.text_logits(features[view, index], functional.normalize(weight, dim=1))  # (B, K)
            loss = functional.cross_entropy(logits, labels[index]) + penalty(weight, text, strength)
            loss.backward()

        train_sgd([weight], accumulate, len(labels), self, views=len(features), generator=generator)
        self.weight_ = functional.normalize(weight.detach(), dim=1)
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"probe": self.text_logits(inputs.float(), self.weight_)}
