"""Training-free baselines on frozen image features: nearest class mean and k nearest neighbours, by cosine.

They use no text, so a method that adds text features has to beat them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from medfocus.learning.folds import seed_of
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Support
from medfocus.learning.selection import choose

NEARER = 1e-3  # extra votes of the nearest image; in all less than one vote, so they only break ties


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the L2-normalised mean of each class: (N, D), (N,) -> (K, D)."""
    onehot = functional.one_hot(labels, classes).to(features.dtype)  # (N, K)
    return functional.normalize(onehot.T @ features / onehot.sum(dim=0)[:, None], dim=-1)


def vote_shares(cosines: Tensor, labels: Tensor, classes: int, neighbours: int) -> Tensor:
    """Return each class's share of the votes of the k nearest images and of one vote that all classes share.

    The j-th nearest image has 1 + 0.001 / j votes, so of two classes with equally many neighbours, the nearer
    class wins.

    Args:
        cosines: (B, N) to the support.
        labels: (N,) of the support, in [0, K).
        classes: K.
        neighbours: k; the size of the support bounds it.

    Returns:
        (B, K), positive, rows summing to 1.
    """
    nearest = cosines.topk(min(neighbours, len(labels)), dim=1).indices  # (B, k)
    votes = 1 + NEARER / torch.arange(1, nearest.shape[1] + 1, dtype=cosines.dtype)  # (k,)
    onehot = functional.one_hot(labels[nearest], classes).to(cosines.dtype)  # (B, k, K)
    counts = (votes[:, None] * onehot).sum(dim=1) + 1 / classes  # (B, K)
    return counts / counts.sum(dim=1, keepdim=True)


@dataclass
class NearestClassMean(FeatureMethod):
    """argmax_k cos(f, μ_k). The logits are s cos(f, μ_k), with CLIP's s."""

    learned: ClassVar[tuple[str, ...]] = ("means",)
    means_: Tensor = field(init=False, repr=False)  # (K, D)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Keep the class means; uses no random draws."""
        features = support.inputs[0].double()
        self.means_ = class_means(features, support.labels, len(support.text_features))
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits s cos(f, μ_k) (N, K)."""
        cosines = functional.normalize(inputs.double(), dim=-1) @ self.means_.T
        return {"cosine": self.encoder.logit_scale * cosines}


@dataclass
class NearestNeighbours(FeatureMethod):
    """Majority vote of the k nearest images of the support; the logits are the logarithm of ``vote_shares``.

    Cross-validation inside the support chooses k from ``neighbours``; k is 1 if no fold can be made.
    """

    neighbours: tuple[int, ...]  # candidates for k
    folds: int  # of the cross-validation that chooses k
    neighbours_: int = field(init=False)
    features_: Tensor = field(init=False, repr=False)  # (N, D)
    labels_: Tensor = field(init=False, repr=False)  # (N,)
    classes_: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"k-nn: neighbours is {list(self.neighbours)}; give one or more values above 0.")

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose k and keep the support."""
        self.features_ = support.inputs[0]
        self.labels_ = support.labels
        self.classes_ = len(support.text_features)
        self.neighbours_ = choose(
            self.neighbours,
            support,
            lambda fit, held: (
                _log_shares(held.inputs[0], fit.inputs[0], fit.labels, self.classes_, neighbours)
                for neighbours in self.neighbours
            ),
            folds=self.folds,
            seed=seed_of(generator),
            otherwise=1,
        )
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        shares = _log_shares(inputs, self.features_, self.labels_, self.classes_, self.neighbours_)
        return {"votes": shares}

    def state(self) -> dict[str, Tensor]:
        """Return the support, the number of classes and the chosen k."""
        numbers = {"neighbours": self.neighbours_, "classes": self.classes_}
        return {
            "features": self.features_,
            "labels": self.labels_,
            **{name: torch.tensor(value) for name, value in numbers.items()},
        }

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.features_, self.labels_ = state["features"], state["labels"]
        self.neighbours_, self.classes_ = int(state["neighbours"]), int(state["classes"])
        return self


def _log_shares(inputs: Tensor, features: Tensor, labels: Tensor, classes: int, neighbours: int) -> Tensor:
    cosines = (
        functional.normalize(inputs.double(), dim=-1) @ functional.normalize(features.double(), dim=-1).T
    )
    return vote_shares(cosines, labels, classes, neighbours).log()
