"""Tip-Adapter and Tip-Adapter-F (Zhang et al., arXiv 2111.03930): a cache of the support beside CLIP.

logits = s f Tᵀ + α exp(-β (1 - f Kᵀ)) V, with K the support's features and V its one-hot labels. The
public code searches α and β on a validation set of its own, for -F once more after training at values set by
hand for each data set, and takes the epoch that is best on test. Here α and β are chosen once, by
cross-validation of the untrained cache inside the support; the keys of -F learn at that pair, from
Tip-Adapter on, and the last iterate is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.method import Support
from medfocus.learning.selection import choose
from medfocus.learning.training import train

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

ALPHA, BETA = 1.0, 1.0  # published, where a class is too small to hold one out


def cache_logits(affinity: Tensor, values: Tensor, beta: float) -> Tensor:
    """exp(-β (1 - affinity)) V: cosines to the keys (B, N), one-hot labels (N, K) -> (B, K)."""
    return (-beta * (1 - affinity)).exp() @ values


@dataclass(frozen=True)
class Cache:
    """Keys with their values, and CLIP's own classifier beside them."""

    keys: Tensor  # (N, D)
    values: Tensor  # (N, K) one-hot
    text_features: Tensor  # (K, D)
    logit_scale: float  # s

    @classmethod
    def of(cls, support: Support, logit_scale: float) -> Self:
        """A key is the normalised mean over the image's views, as published for augmented supports."""
        keys = functional.normalize(support.inputs.float().mean(dim=0), dim=-1)  # (V, N, D) -> (N, D)
        values = functional.one_hot(support.labels, len(support.text_features)).to(keys.dtype)
        return cls(keys, values, support.text_features, logit_scale)

    def logits(self, features: Tensor, alpha: float, beta: float) -> Tensor:
        """Features (B, D) -> s f Tᵀ + α exp(-β (1 - f Kᵀ)) V, (B, K)."""
        return next(iter(self.all_logits(features, [(alpha, beta)])))

    def all_logits(self, features: Tensor, candidates: Iterable[tuple[float, float]]) -> Iterable[Tensor]:
        """The logits (B, K) for each (α, β)."""
        zero_shot = self.logit_scale * features @ self.text_features.to(features.dtype).T  # (B, K)
        affinity = features @ self.keys.to(features.dtype).T  # (B, D) @ (D, N) -> (B, N)
        values = self.values.to(features.dtype)
        known: dict[float, Tensor] = {}
        for alpha, beta in candidates:
            if beta not in known:
                known[beta] = cache_logits(affinity, values, beta)
            yield zero_shot + alpha * known[beta]

    def state(self) -> dict[str, Tensor]:
        """Its tensors, by names that a checkpoint keeps."""
        return {"keys": self.keys, "values": self.values, "text_features": self.text_features}

    @classmethod
    def load(cls, state: Mapping[str, Tensor], logit_scale: float) -> Self:
        """The cache of which ``state`` was taken; other names in it are passed over."""
        return cls(state["keys"], state["values"], state["text_features"], logit_scale)


def choose_pair(
    support: Support,
    logit_scale: float,
    *,
    alphas: Sequence[float],
    betas: Sequence[float],
    folds: int,
    seed: int,
) -> tuple[float, float]:
    """The (α, β) by which a cache of the rest of the support predicts its held-out folds best."""
    pairs = list(product(alphas, betas))
    return choose(
        pairs,
        support,
        lambda fit, held: Cache.of(fit, logit_scale).all_logits(held.inputs[0].double(), pairs),
        folds=folds,
        seed=seed,
        otherwise=(ALPHA, BETA),
    )


def _check_grid(method: str, **grids: tuple[float, ...]) -> None:
    for name, values in grids.items():
        if not values or min(values) <= 0:
            raise ValueError(f"{method}: {name} is {list(values)}; give one or more values above 0.")


@dataclass
class TipAdapter:
    """Training-free: the support is the classifier. Several ``alphas`` or ``betas``: a pair is chosen."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    alphas: tuple[float, ...]  # candidates for α, the weight of the cache beside CLIP
    betas: tuple[float, ...]  # candidates for β, how near a key has to be
    folds: int  # of the cross-validation that chooses them
    alpha_: float = field(init=False)
    beta_: float = field(init=False)
    cache_: Cache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_grid("tip-adapter", alphas=self.alphas, betas=self.betas)

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose α and β, then keep the support as the cache."""
        self.alpha_, self.beta_ = choose_pair(
            support,
            self.encoder.logit_scale,
            alphas=self.alphas,
            betas=self.betas,
            folds=self.folds,
            seed=generator.initial_seed() % 2**32,
        )
        self.cache_ = Cache.of(support, self.encoder.logit_scale)
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"cache": self.cache_.logits(inputs.double(), self.alpha_, self.beta_)}

    def state(self) -> dict[str, Tensor]:
        """Keys, values, class texts and the chosen α and β."""
        chosen = {"alpha": self.alpha_, "beta": self.beta_}
        return self.cache_.state() | {k: torch.tensor(v, dtype=torch.float64) for k, v in chosen.items()}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.cache_ = Cache.load(state, self.encoder.logit_scale)
        self.alpha_, self.beta_ = float(state["alpha"]), float(state["beta"])
        return self


@dataclass
class TipAdapterF:
    """The keys learn, from the cache on, by cross-entropy; the values and CLIP's classifier stay.

    AdamW's ε is PyTorch's 1e-8, where the public code takes 1e-4.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    alphas: tuple[float, ...]  # candidates for α, the weight of the cache beside CLIP
    betas: tuple[float, ...]  # candidates for β, how near a key has to be
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    folds: int  # of the cross-validation that chooses α and β
    alpha_: float = field(init=False)
    beta_: float = field(init=False)
    cache_: Cache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_grid("tip-adapter-f", alphas=self.alphas, betas=self.betas)

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose α and β as Tip-Adapter does, then train the keys at them."""
        scale = self.encoder.logit_scale
        self.alpha_, self.beta_ = choose_pair(
            support,
            scale,
            alphas=self.alphas,
            betas=self.betas,
            folds=self.folds,
            seed=generator.initial_seed() % 2**32,
        )
        cache = Cache.of(support, scale)
        keys = nn.Parameter(cache.keys.clone())
        learning = replace(cache, keys=keys)
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        train(
            [keys],
            lambda index, view: functional.cross_entropy(
                learning.logits(features[view, index], self.alpha_, self.beta_), labels[index]
            ),
            labels,
            views=len(features),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            generator=generator,
        )
        self.cache_ = replace(cache, keys=keys.detach())
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"cache": self.cache_.logits(inputs.double(), self.alpha_, self.beta_)}

    def state(self) -> dict[str, Tensor]:
        """Trained keys, values, class texts and the chosen α and β."""
        chosen = {"alpha": self.alpha_, "beta": self.beta_}
        return self.cache_.state() | {k: torch.tensor(v, dtype=torch.float64) for k, v in chosen.items()}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.cache_ = Cache.load(state, self.encoder.logit_scale)
        self.alpha_, self.beta_ = float(state["alpha"]), float(state["beta"])
        return self
