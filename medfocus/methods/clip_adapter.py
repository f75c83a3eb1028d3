"""CLIP-Adapter (Gao et al., arXiv 2110.04544): a residual bottleneck on the image features.

f' = norm(r A(f) + (1 - r) f), A(f) = ReLU(W2 ReLU(W1 f)), logits s f' Tᵀ. As in the public code, there are no
biases, W1 and W2 start as PyTorch's linear layers do, and the text features have no adapter. The public code
fixes r at 0.2 and names no training settings; the paper searches r for every dataset. Here, cross-validation
inside the support chooses r from ``ratios``.

The paper's learning rate of 1e-5 comes without an optimiser and without a number of epochs. A hundred steps
of AdamW at this rate move no weight by more than 1e-3, so W1 and W2 would stay random; params.yaml has higher
rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.folds import seed_of
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Support, with_prefix
from medfocus.learning.selection import choose
from medfocus.learning.training import Schedule, seeded, train

RATIO_WITHOUT_VALIDATION = 0.2  # published; used if a class is too small for cross-validation


class Adapter(nn.Module):
    """f -> norm(r A(f) + (1 - r) f) with A(f) = ReLU(W2 ReLU(W1 f))."""

    def __init__(self, dim: int, reduction: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, dim // reduction)
        self.down = nn.Linear(dim, hidden, bias=False)  # W1
        self.up = nn.Linear(hidden, dim, bias=False)  # W2
        self.ratio = ratio

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D), L2-normalised."""
        adapted = self.up(self.down(features).relu()).relu()
        return functional.normalize(self.ratio * adapted + (1 - self.ratio) * features, dim=-1)


@dataclass
class ClipAdapter(Schedule, FeatureMethod):
    """Trains the adapter by cross-entropy against frozen text features."""

    takes_views: ClassVar[bool] = True
    ratios: tuple[float, ...]  # candidates for r, the share of A(f) in f'
    reduction: int  # of the bottleneck: D to D / reduction
    folds: int  # of the cross-validation that chooses r
    ratio_: float = field(init=False)
    adapter_: Adapter = field(init=False, repr=False)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(
                f"clip-adapter: ratios is {list(self.ratios)}; give one or more values of r in [0, 1]."
            )
        if self.reduction < 1:
            raise ValueError(f"clip-adapter: reduction is {self.reduction}; use 1 or more (published: 4).")

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose r, then train the adapter on the whole support."""
        self.text_features_ = support.text_features
        seed = seed_of(generator)

        def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
            for ratio in self.ratios:
                adapter = self._train(fit, ratio, torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    logits = self.text_logits(adapter(held.inputs[0].float()), self.text_features_)
                yield logits

        self.ratio_ = choose(
            self.ratios,
            support,
            held_out_logits,
            folds=self.folds,
            seed=seed,
            otherwise=RATIO_WITHOUT_VALIDATION,
        )
        self.adapter_ = self._train(support, self.ratio_, generator)
        return self

    def _train(self, support: Support, ratio: float, generator: torch.Generator) -> Adapter:
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        with seeded(generator.initial_seed()):
            adapter = Adapter(features.shape[-1], self.reduction, ratio)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            logits = self.text_logits(adapter(features[view, index]), self.text_features_)
            return functional.cross_entropy(logits, labels[index])

        train(adapter.parameters(), loss, labels, self, views=len(features), generator=generator)
        return adapter.eval()

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """Adapted features f': (N, D) -> (N, D)."""
        return self.adapter_(inputs.float())

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"text": self.text_logits(self.encode(inputs), self.text_features_)}

    def state(self) -> dict[str, Tensor]:
        """Return W1, W2, the text features and the chosen r."""
        ratio = torch.tensor(self.ratio_, dtype=torch.float64)
        adapter = self.adapter_.state_dict(prefix="adapter.")
        return {"text_features": self.text_features_, "ratio": ratio, **adapter}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.ratio_ = float(state["ratio"])
        self.adapter_ = Adapter(self.text_features_.shape[1], self.reduction, self.ratio_).eval()
        self.adapter_.load_state_dict(with_prefix(state, "adapter."))
        return self
