"""CLIP (Radford et al., arXiv 2103.00020): zero-shot, linear probe, few-shot fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.folds import seed_of
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.method import Method, Support, with_prefix
from medfocus.learning.probe import Probe, fit_probe
from medfocus.learning.training import Schedule, train


@dataclass
class ClipZeroShot(FeatureMethod):
    """argmax_k I·T_k. It learns nothing, so every support gives the same answer."""

    learned: ClassVar[tuple[str, ...]] = ("text_features",)
    learns: ClassVar[bool] = False
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Keep the text features of the classes; the labels are not used."""
        self.text_features_ = support.text_features
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"zero-shot": self.text_logits(inputs, self.text_features_)}


@dataclass
class ClipLinearProbe(FeatureMethod):
    """Logistic regression on I; cross-validation inside the support chooses C."""

    folds: int  # of the cross-validation that chooses C
    probe_: Probe = field(init=False, repr=False)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Fit the probe on the unaugmented view."""
        self.probe_ = fit_probe(
            support.inputs[0].numpy(),
            support.labels.numpy(),
            support.groups.numpy(),
            folds=self.folds,
            seed=seed_of(generator),
        )
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"probe": torch.from_numpy(self.probe_.logits(inputs.numpy()))}

    def state(self) -> dict[str, Tensor]:
        """Return the probe's parameters."""
        return self.probe_.state()

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.probe_ = Probe.load(state)
        return self


@dataclass
class ClipFewShot(Schedule, Method):
    """Full fine-tuning of the image encoder's last blocks against frozen text features.

    The earlier blocks are frozen, so their tokens are computed once per image and view and cached. The loss
    is the cross-entropy of s I Tᵀ.
    """

    takes_views: ClassVar[bool] = True
    blocks: (
        int  # number of last blocks to train, with pooling and projection; a convolutional net's are stages
    )
    max_steps: int  # upper bound on optimisation steps; the first epoch always runs in full
    tail_: nn.Module = field(init=False, repr=False)  # (B, L, W) -> (B, D)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    @property
    def trained_blocks(self) -> int:
        """See ``Method.trained_blocks``."""
        return self.blocks

    @property
    def embedding(self) -> str:
        """Tokens in front of the trained blocks."""
        return f"tokens-{self.blocks}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> tokens (B, L, W)."""
        return self.encoder.trunk(self.encoder.preprocess(images), self.blocks)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Fine-tune a copy of the encoder's tail."""
        self.text_features_ = support.text_features
        self.tail_ = self.encoder.tail(self.blocks).train()
        tokens, labels = support.inputs.float(), support.labels  # (V, N, L, W), (N,)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            features = self.tail_(tokens[view, index])  # (B, D)
            return functional.cross_entropy(self.text_logits(features, self.text_features_), labels[index])

        train(
            self.tail_.parameters(),
            loss,
            labels,
            self,
            views=len(tokens),
            generator=generator,
            max_steps=self.max_steps,
        )
        self.tail_.eval()
        return self

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, L, W) -> logits (N, K)."""
        features = torch.cat([self.tail_(batch.float()) for batch in inputs.split(64)])
        return {"text": self.text_logits(features, self.text_features_)}

    def state(self) -> dict[str, Tensor]:
        """Return the fine-tuned tail and the text features."""
        return {"text_features": self.text_features_, **self.tail_.state_dict(prefix="tail.")}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.tail_ = self.encoder.tail(self.blocks).eval()
        self.tail_.load_state_dict(with_prefix(state, "tail."))
        return self
