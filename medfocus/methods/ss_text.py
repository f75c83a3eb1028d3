"""SS-Text (Silva-Rodríguez et al., "Full Conformal Adaptation of Medical Vision-Language Models", IPMI 2025).

A linear probe in closed form: w_k is pulled towards the images of class k and held near its text features.
The minimum of -(s / N) Σ_i f_i·w_{y_i} + ½ Σ_k λ_k |w_k - t_k|² is w_k = t_k + (s / (N λ_k)) Σ_{i∈k} f_i. λ_k
is 1/N as published; the successor SS-Text+ takes 1/N_k, with N_k the number of images of class k. As in the
public code, w_k is L2-normalised before it classifies, so a larger class has no advantage. The public code
has a lower bound of 1e-3 on λ_k, which matters above 1,000 images; this module has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Support


def closed_form(
    features: Tensor, labels: Tensor, text_features: Tensor, logit_scale: float, penalty: Tensor
) -> Tensor:
    """w_k = t_k + (s / (N λ_k)) Σ_{i∈k} f_i.

    Args:
        features: (N, D) L2-normalised.
        labels: (N,) integers in [0, K).
        text_features: (K, D) L2-normalised.
        logit_scale: s.
        penalty: λ, (K,).

    Returns:
        (K, D).
    """
    onehot = functional.one_hot(labels, len(text_features)).to(features.dtype)  # (N, K)
    share = logit_scale / (len(labels) * penalty)  # (K,)
    return text_features + share[:, None] * (onehot.T @ features)


@dataclass
class SsText(FeatureMethod):
    """Closed form: nothing to train and no hyperparameters."""

    learned: ClassVar[tuple[str, ...]] = ("weight",)
    weight_: Tensor = field(init=False, repr=False)  # (K, D) L2-normalised

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Compute w; uses no random draws."""
        features, text = support.inputs[0].double(), support.text_features.double()
        penalty = torch.full((len(text),), 1 / len(features), dtype=text.dtype)
        weight = closed_form(features, support.labels, text, self.encoder.logit_scale, penalty)
        self.weight_ = functional.normalize(weight, dim=-1)
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits s f wᵀ (N, K)."""
        return {"blend": self.encoder.logit_scale * inputs.double() @ self.weight_.T}
