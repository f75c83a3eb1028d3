"""LP++ (Huang et al., CVPR 2024, arXiv 2404.02285): a linear probe blended with the text features.

Logits l_ik = f_i·(w_k + α_k t_k), cross-entropy; w and α learn on the full batch with step sizes computed
from the data. This module deviates where the paper and the public code differ, or where the code does
something that no equation states:

- The code keeps the step that is best on a validation set. Here the last iterate is kept.
- The code gives the classifier a bias that starts at random. Here there is no bias, as in the equation.
- The code never clears the gradient of α between its updates. Here each update uses the current gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Support

ALPHA_SCALE = 250.0  # published: initial α for a mean cosine of 1 between image and class text
MOMENTUM = 0.9  # published, for the steps of w
STEPS_OF_W = 10  # published: steps of w per step of α


def blended_logits(features: Tensor, weight: Tensor, alpha: Tensor, text_features: Tensor) -> Tensor:
    """l_ik = f_i·(w_k + α_k t_k): (B, D), (K, D), (K,), (K, D) -> (B, K)."""
    return features @ (weight + alpha[:, None] * text_features).T


def start(features: Tensor, onehot: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the initial w_k = Σ_{i∈k} f_i and α = 250 mean_k mean_{i∈k} f_i·t_k, equal for all classes.

    (N, D), (N, K), (K, D) -> (K, D), (K,).
    """
    cosines = (onehot * (features @ text_features.T)).sum(dim=0) / onehot.sum(dim=0)  # (K,)
    return onehot.T @ features, torch.full_like(cosines, ALPHA_SCALE * float(cosines.mean()))


def step_sizes(features: Tensor, text_features: Tensor) -> tuple[float, float]:
    """Return the published step sizes η_w = 4 N / λ_max(FᵀF) and η_α = N / (4 max_k Σ_i (f_i·t_k)²).

    As p (1 - p) is at most 1/4, λ_max / 4N bounds the curvature of the loss in one class's w_k, and η_w is
    the inverse of this bound. For all classes together the bound is twice as large, so η_w is twice its
    inverse; a momentum of 0.9 keeps steps stable up to 3.8 times the inverse. η_α is an eighth of the inverse
    of the bound on the curvature in α.
    """
    count = len(features)
    largest = float(torch.linalg.matrix_norm(features, 2).square())
    text = float((features @ text_features.T).square().sum(dim=0).max())
    return 4 * count / largest, count / (4 * max(text, 1e-12))


def minimise(features: Tensor, labels: Tensor, text_features: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Take ``steps`` full-batch steps: features (N, D), labels (N,), texts (K, D) -> w (K, D), α (K,)."""
    count = len(labels)
    onehot = functional.one_hot(labels, len(text_features)).to(features.dtype)  # (N, K)
    cosines = features @ text_features.T  # (N, K)
    weight, alpha = start(features, onehot, text_features)
    step_w, step_alpha = step_sizes(features, text_features)
    velocity = torch.zeros_like(weight)
    for step in range(1, steps + 1):
        shares = (features @ weight.T + alpha * cosines).softmax(dim=1)
        residual = (shares - onehot) / count  # (N, K), the gradient in the logits
        velocity = MOMENTUM * velocity + residual.T @ features
        weight = weight - step_w * velocity
        if step % STEPS_OF_W == 0:
            alpha = alpha - step_alpha * (residual * cosines).sum(dim=0)
    return weight, alpha


@dataclass
class LpPlusPlus(FeatureMethod):
    """LP++. The only hyperparameter is ``steps``; initial values and step sizes come from the support."""

    learned: ClassVar[tuple[str, ...]] = ("weight", "alpha", "text_features")
    steps: int  # full-batch steps of w
    weight_: Tensor = field(init=False, repr=False)  # (K, D) w
    alpha_: Tensor = field(init=False, repr=False)  # (K,)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Learn w and α; uses no random draws."""
        self.text_features_ = support.text_features
        features, text = support.inputs[0].double(), support.text_features.double()
        self.weight_, self.alpha_ = minimise(features, support.labels, text, self.steps)
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        text = self.text_features_.double()
        return {"blend": blended_logits(inputs.double(), self.weight_, self.alpha_, text)}
