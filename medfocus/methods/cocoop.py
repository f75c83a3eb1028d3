"""CoCoOp (Zhou et al., arXiv 2203.05557): CoOp's contexts, moved by the image that is looked at.

v_m(x) = v_m + h(f), h = Linear(D, D/16)-ReLU-Linear(D/16, W), and the logits are s f t_k(x), of frozen image
features f. So every image has K texts of its own, and a batch of B is B K passes through the text tower.
They go in chunks of images whose gradients add up, so that memory grows with the chunk and not with the
batch. Published are M = 4 from "a photo of a", SGD of 2e-3 with a cosine after one epoch at 1e-5, and 10
epochs of single images.

A departure from the paper: ``max_steps`` bounds the training, and the schedule then runs through the same
epochs in fewer steps. And the images' views are drawn from a cached few.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.clip.prompt_learning import (
    ContextTexts,
    ContextTower,
    check_prompt_learning,
    start_contexts,
    train_sgd,
    write_texts,
)
from medfocus.learning.method import Support

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

_TEXTS = 64  # that go through the text tower at once where no gradient is kept


class ConditionalContexts(nn.Module):
    """Image features -> contexts, v_m + h(f)."""

    def __init__(self, start: Tensor, dim: int, reduction: int) -> None:
        """Start at the contexts ``start`` (M, W), and h as PyTorch's linear layers do."""
        super().__init__()
        hidden = max(1, dim // reduction)
        self.contexts = nn.Parameter(start.clone())  # v
        self.shift = nn.Sequential(  # h
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, start.shape[1])
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, M, W)."""
        return self.contexts + self.shift(features)[:, None]


@dataclass
class CoCoOp:
    """Trains the contexts, which all classes share, and the small network that moves them."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = True
    encoder: ClipEncoder
    contexts: int  # M
    start: str  # words of M tokens at which the contexts start; empty: N(0, 0.02)
    reduction: int  # of h: D to D / reduction
    chunk: int  # images whose texts go through the text tower at once while training
    epochs: int
    max_steps: int  # of the optimisation, whatever the epochs
    batch_size: int
    lr: float
    warmup: int  # epochs at 1e-5
    weight_decay: float
    network_: ConditionalContexts = field(init=False, repr=False)
    tower_: ContextTower = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_prompt_learning(
            "cocoop",
            contexts=self.contexts,
            reduction=self.reduction,
            chunk=self.chunk,
            epochs=self.epochs,
            warmup=self.warmup,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
        )

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train contexts and network on frozen image features.

        Raises ValueError as ``write_texts`` and ``start_contexts`` do.
        """
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        texts = write_texts("cocoop", self.encoder, support.class_names, self.contexts)
        self.tower_ = ContextTower(self.encoder, texts)
        start = start_contexts("cocoop", self.encoder, self.contexts, self.start, generator)
        with torch.random.fork_rng(devices=[]):  # of h's start
            torch.manual_seed(generator.initial_seed())
            self.network_ = ConditionalContexts(start, features.shape[-1], self.reduction)
        train_sgd(
            self.network_.parameters(),
            lambda index, view: self.accumulate(features[view, index], labels[index]),
            len(labels),
            views=len(features),
            epochs=self.epochs,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            generator=generator,
        )
        self.network_.eval().requires_grad_(False)
        return self

    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Add the gradient of a batch's mean cross-entropy, from features (B, D) and labels (B,)."""
        for part, target in zip(features.split(self.chunk), labels.split(self.chunk), strict=True):
            loss = functional.cross_entropy(self._classify(part), target, reduction="sum")
            (loss / len(labels)).backward()

    def _classify(self, features: Tensor) -> Tensor:
        """s f t_k(x): (B, D) -> (B, K)."""
        text_features = self.tower_(self.network_(features)[:, None])  # (B, K, D)
        return self.encoder.logit_scale * torch.einsum("bd,bkd->bk", features, text_features)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        images = max(1, _TEXTS // len(self.tower_.texts.tokens))
        return {"text": torch.cat([self._classify(part) for part in inputs.float().split(images)])}

    def state(self) -> dict[str, Tensor]:
        """The contexts, h, and the tokenised class texts with the contexts' places in them."""
        texts = {"tokens": self.tower_.texts.tokens, "slots": self.tower_.texts.slots}
        return {**texts, **{f"network.{name}": value for name, value in self.network_.state_dict().items()}}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.tower_ = ContextTower(self.encoder, ContextTexts(state["tokens"], state["slots"]))
        network = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        with torch.random.fork_rng(devices=[]):  # the start of h is drawn, and then replaced
            dim = network["shift.0.weight"].shape[1]
            self.network_ = ConditionalContexts(network["contexts"], dim, self.reduction)
        self.network_.load_state_dict(network)
        self.network_.eval().requires_grad_(False)
        return self
