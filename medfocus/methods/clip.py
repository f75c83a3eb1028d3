"""CLIP itself (Radford et al., arXiv 2103.00020): zero-shot, linear probe, few-shot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.method import Support
from medfocus.learning.probe import Probe, fit_probe
from medfocus.learning.training import train

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


def zero_shot_logits(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """s I Tᵀ, the class logits of CLIP: (B, D), (K, D) -> (B, K)."""
    return logit_scale * image_features @ text_features.T


@dataclass
class ClipZeroShot:
    """argmax_k I·T_k; learns nothing, so every support gives the same answer."""

    learns: ClassVar[bool] = False
    takes_views: ClassVar[bool] = False
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Keep the class texts; the labels are not looked at."""
        self.text_features_ = support.text_features
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"zero-shot": zero_shot_logits(inputs, self.text_features_, self.encoder.logit_scale)}

    def state(self) -> dict[str, Tensor]:
        """The class texts."""
        return {"text_features": self.text_features_}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        return self


@dataclass
class ClipLinearProbe:
    """Logistic regression on I, C chosen by cross-validation inside the support."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = False
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    folds: int  # of the cross-validation that chooses C
    probe_: Probe = field(init=False, repr=False)

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Fit the probe on the unaugmented view."""
        self.probe_ = fit_probe(
            support.inputs[0].numpy(),
            support.labels.numpy(),
            support.groups.numpy(),
            folds=self.folds,
            seed=generator.initial_seed() % 2**32,
        )
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"probe": torch.from_numpy(self.probe_.logits(inputs.numpy()))}

    def state(self) -> dict[str, Tensor]:
        """The probe."""
        return self.probe_.state()

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.probe_ = Probe.load(state)
        return self


@dataclass
class ClipFewShot:
    """Full fine-tuning of the image encoder's last blocks against frozen class texts.

    The blocks before them are frozen, so their tokens are computed once per image and view and
    cached; one step costs only what trains. The loss is cross-entropy on s I Tᵀ.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    blocks: int  # how many of the last transformer blocks train, with ln_post and the projection
    epochs: int
    max_steps: int  # a bound on epochs, in optimisation steps; one epoch is always made
    batch_size: int
    lr: float
    weight_decay: float
    tail_: nn.Module = field(init=False, repr=False)  # (B, L, W) -> (B, D)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    @property
    def embedding(self) -> str:
        """Tokens at the entrance of what trains."""
        return f"tokens-{self.blocks}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> tokens (B, L, W)."""
        return self.encoder.trunk(self.encoder.preprocess(images), self.blocks)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Fine-tune a copy of the tail; the encoder itself is left as it was."""
        self.text_features_ = support.text_features
        self.tail_ = self.encoder.tail(self.blocks).train()
        tokens, labels = support.inputs.float(), support.labels  # (V, N, L, W), (N,)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            features = self.tail_(tokens[view, index])  # (B, D)
            logits = zero_shot_logits(features, self.text_features_, self.encoder.logit_scale)
            return functional.cross_entropy(logits, labels[index])

        train(
            self.tail_.parameters(),
            loss,
            labels,
            views=len(tokens),
            epochs=self.epochs,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            generator=generator,
        )
        self.tail_.eval()
        return self

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, L, W) -> logits (N, K)."""
        features = torch.cat([self.tail_(batch.float()) for batch in inputs.split(64)])
        return {"text": zero_shot_logits(features, self.text_features_, self.encoder.logit_scale)}

    def state(self) -> dict[str, Tensor]:
        """The fine-tuned tail and the class texts."""
        tail = {f"tail.{name}": value for name, value in self.tail_.state_dict().items()}
        return {"text_features": self.text_features_, **tail}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.tail_ = self.encoder.tail(self.blocks).eval()
        self.tail_.load_state_dict(
            {name.removeprefix("tail."): value for name, value in state.items() if name.startswith("tail.")}
        )
        return self
