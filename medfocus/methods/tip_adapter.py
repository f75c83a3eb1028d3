"""Tip-Adapter and Tip-Adapter-F (Zhang et al., arXiv 2111.03930): CLIP with a cache of the support.

logits = s f Tᵀ + α exp(-β (1 - f Kᵀ)) V, with K the support's features and V its one-hot labels. The public
code searches α and β on a separate validation set. Its Tip-Adapter-F trains at values that are set by hand
for each dataset, takes the epoch that is best on test, and searches α and β again. Here, cross-validation of
the untrained cache inside the support chooses α and β once. The keys of Tip-Adapter-F start at the untrained
cache, train at this α and β, and keep the last iterate.

A key is the mean over the cached views of an image, ten in the public code. The public search takes 200
values of β and 20 of α, up to limits that are set by hand for each dataset, such as 7 and 3. Folds of a few
images cannot tell such close values apart. So params.yaml has one coarse and wide grid for all datasets, and
log-likelihood decides instead of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.folds import seed_of
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Support
from medfocus.learning.selection import choose
from medfocus.learning.training import Schedule, train

ALPHA, BETA = 1.0, 1.0  # published; used if a class is too small for cross-validation


def cache_logits(affinity: Tensor, values: Tensor, beta: float) -> Tensor:
    """exp(-β (1 - affinity)) V: cosines to the keys (B, N), one-hot labels (N, K) -> (B, K)."""
    return (-beta * (1 - affinity)).exp() @ values


@dataclass(frozen=True)
class Cache:
    """Keys with their values, and CLIP's zero-shot classifier."""

    keys: Tensor  # (N, D)
    values: Tensor  # (N, K) one-hot
    text_features: Tensor  # (K, D)
    logit_scale: float  # s

    @classmethod
    def of(cls, support: Support, logit_scale: float) -> Self:
        """Return the cache of a support; a key is the normalised mean over an image's views, as published."""
        keys = functional.normalize(support.inputs.float().mean(dim=0), dim=-1)  # (V, N, D) -> (N, D)
        values = functional.one_hot(support.labels, len(support.text_features)).to(keys.dtype)
        return cls(keys, values, support.text_features, logit_scale)

    def logits(self, features: Tensor, alpha: float, beta: float) -> Tensor:
        """Features (B, D) -> s f Tᵀ + α exp(-β (1 - f Kᵀ)) V, (B, K)."""
        return next(iter(self.all_logits(features, [(alpha, beta)])))

    def all_logits(self, features: Tensor, candidates: Iterable[tuple[float, float]]) -> Iterable[Tensor]:
        """Yield the logits (B, K) for each (α, β)."""
        zero_shot = self.logit_scale * features @ self.text_features.to(features.dtype).T  # (B, K)
        affinity = features @ self.keys.to(features.dtype).T  # (B, D) @ (D, N) -> (B, N)
        values = self.values.to(features.dtype)
        known: dict[float, Tensor] = {}  # by β
        for alpha, beta in candidates:
            if beta not in known:
                known[beta] = cache_logits(affinity, values, beta)
            yield zero_shot + alpha * known[beta]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a checkpoint."""
        return {"keys": self.keys, "values": self.values, "text_features": self.text_features}

    @classmethod
    def load(cls, state: Mapping[str, Tensor], logit_scale: float) -> Self:
        """Return the cache with the tensors in ``state``; other names are ignored."""
        return cls(state["keys"], state["values"], state["text_features"], logit_scale)


@dataclass
class TipAdapter(FeatureMethod):
    """Training-free: the support is the classifier. Cross-validation chooses α and β."""

    takes_views: ClassVar[bool] = True
    name: ClassVar[str] = "tip-adapter"
    alphas: tuple[float, ...]  # candidates for α, the weight of the cache
    betas: tuple[float, ...]  # candidates for β, the sharpness of the affinity
    folds: int  # of the cross-validation that chooses α and β
    alpha_: float = field(init=False)
    beta_: float = field(init=False)
    cache_: Cache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, values in (("alphas", self.alphas), ("betas", self.betas)):
            if not values or min(values) <= 0:
                raise ValueError(f"{self.name}: {name} is {list(values)}; give one or more values above 0.")

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose α and β, then keep the support as the cache."""
        scale = self.encoder.logit_scale
        pairs = list(product(self.alphas, self.betas))
        self.alpha_, self.beta_ = choose(
            pairs,
            support,
            lambda fit, held: Cache.of(fit, scale).all_logits(held.inputs[0].double(), pairs),
            folds=self.folds,
            seed=seed_of(generator),
            otherwise=(ALPHA, BETA),
        )
        self.cache_ = Cache.of(support, scale)
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"cache": self.cache_.logits(inputs.double(), self.alpha_, self.beta_)}

    def state(self) -> dict[str, Tensor]:
        """Return keys, values, text features and the chosen α and β."""
        chosen = {"alpha": self.alpha_, "beta": self.beta_}
        return self.cache_.state() | {k: torch.tensor(v, dtype=torch.float64) for k, v in chosen.items()}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.cache_ = Cache.load(state, self.encoder.logit_scale)
        self.alpha_, self.beta_ = float(state["alpha"]), float(state["beta"])
        return self


@dataclass
class TipAdapterF(Schedule, TipAdapter):
    """Tip-Adapter with trained keys; the values and CLIP's zero-shot classifier stay fixed.

    AdamW's ε is PyTorch's 1e-8. The public code takes 1e-4, because it trains in half precision, where 1e-8
    rounds to zero; here the keys are float32.
    """

    name: ClassVar[str] = "tip-adapter-f"

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Fit Tip-Adapter, then train its keys at the chosen α and β by cross-entropy."""
        super().fit(support, generator)
        keys = nn.Parameter(self.cache_.keys.clone())
        learning = replace(self.cache_, keys=keys)
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            logits = learning.logits(features[view, index], self.alpha_, self.beta_)  # (B, K)
            return functional.cross_entropy(logits, labels[index])

        train([keys], loss, labels, self, views=len(features), generator=generator)
        self.cache_ = replace(self.cache_, keys=keys.detach())
        return self
