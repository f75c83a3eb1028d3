"""The training-free rows on frozen image features: nearest class mean and k nearest neighbours, by cosine.

What a support is worth without any text: a method that blends texts in has to beat these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from medfocus.learning.method import Support
from medfocus.learning.selection import choose

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

NEARER = 1e-3  # what being nearer adds to a vote: less than a vote, so it only decides ties


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """L2-normalised mean of each class: (N, D), (N,) -> (K, D)."""
    onehot = functional.one_hot(labels, classes).to(features.dtype)  # (N, K)
    return functional.normalize(onehot.T @ features / onehot.sum(dim=0)[:, None], dim=-1)


def vote_shares(cosines: Tensor, labels: Tensor, classes: int, neighbours: int) -> Tensor:
    """Shares of the votes of the k nearest, with one vote more spread evenly over the classes.

    The j-th nearest has 1 + 0.001 / j votes: of two classes with as many neighbours the nearer one wins.

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
class NearestClassMean:
    """argmax_k cos(f, μ_k). The cosines are multiplied by CLIP's s, so that probabilities exist."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = False
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    means_: Tensor = field(init=False, repr=False)  # (K, D)

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Keep the class means; nothing is drawn."""
        features = support.inputs[0].double()
        self.means_ = class_means(features, support.labels, len(support.text_features))
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits s cos(f, μ_k) (N, K)."""
        cosines = functional.normalize(inputs.double(), dim=-1) @ self.means_.T
        return {"cosine": self.encoder.logit_scale * cosines}

    def state(self) -> dict[str, Tensor]:
        """The class means."""
        return {"means": self.means_}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.means_ = state["means"]
        return self


@dataclass
class NearestNeighbours:
    """The majority of the k nearest images of the support; logits are the logarithm of ``vote_shares``.

    Several ``neighbours``: k is chosen by cross-validation inside the support; it is 1 where no fold can be
    made.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = False
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    neighbours: tuple[int, ...]  # candidates for k
    folds: int  # of the cross-validation that chooses k
    neighbours_: int = field(init=False)
    features_: Tensor = field(init=False, repr=False)  # (N, D)
    labels_: Tensor = field(init=False, repr=False)  # (N,)
    classes_: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"k-nn: neighbours is {list(self.neighbours)}; give one or more values above 0.")

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

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
            seed=generator.initial_seed() % 2**32,
            otherwise=1,
        )
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        shares = _log_shares(inputs, self.features_, self.labels_, self.classes_, self.neighbours_)
        return {"votes": shares}

    def state(self) -> dict[str, Tensor]:
        """The support, the number of classes and the chosen k."""
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
