"""CoCoOp (Zhou et al., arXiv 2203.05557): CoOp's contexts, shifted by the features of the image.

v_m(x) = v_m + h(f), h = Linear(D, D/16)-ReLU-Linear(D/16, W), and the logits are s f t_k(x) for frozen image
features f. Every image has its own K prompts, so a batch of B images takes B K passes through the text tower.
The passes run in chunks of images with accumulated gradients, so that memory depends on the chunk and not on
the batch. The published settings are M = 4 contexts that start at "a photo of a"; SGD with learning rate 2e-3
and a cosine, after one epoch at 1e-5; and 10 epochs with batches of one image.

Deviations from the paper: each step draws its views from a few cached views. The small schedule bounds the
training by ``max_steps``, and then covers the same epochs in fewer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.clip.prompt_learning import ContextTexts, ContextTower, start_contexts, write_texts
from medfocus.learning.contexts import ContextMethod, train_sgd
from medfocus.learning.method import Support, with_prefix
from medfocus.learning.training import seeded

_TEXTS = 64  # prompts per pass through the text tower without gradients


class ConditionalContexts(nn.Module):
    """Image features -> contexts, v_m + h(f)."""

    def __init__(self, start: Tensor, dim: int, reduction: int) -> None:
        """Start at the contexts ``start`` (M, W); h starts as PyTorch's linear layers do."""
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
class CoCoOp(ContextMethod):
    """Trains the contexts, which all classes share, and the small network that shifts them."""

    name: ClassVar[str] = "cocoop"
    reduction: int  # of h: D to D / reduction
    chunk: int  # images per pass through the text tower in training
    network_: ConditionalContexts = field(init=False, repr=False)
    tower_: ContextTower = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.check("reduction", "chunk")

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train contexts and network on frozen image features.

        Raises ValueError as ``write_texts`` and ``start_contexts`` do.
        """
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        texts = write_texts("cocoop", self.encoder, support.class_names, self.contexts)
        self.tower_ = ContextTower(self.encoder, texts)
        start = start_contexts("cocoop", self.encoder, self.contexts, self.start, generator)
        with seeded(generator.initial_seed()):  # for the initial h
            self.network_ = ConditionalContexts(start, features.shape[-1], self.reduction)

        def accumulate(index: Tensor, view: Tensor) -> None:
            self.accumulate(features[view, index], labels[index])

        train_sgd(
            self.network_.parameters(),
            accumulate,
            len(labels),
            self.schedule_for(len(labels), len(texts.tokens)),
            views=len(features),
            generator=generator,
        )
        self.network_.eval().requires_grad_(False)
        return self

    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Add the gradient of the mean cross-entropy of features (B, D) and labels (B,)."""
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
        """Return the contexts, h, and the tokenised prompts with the positions of the contexts."""
        texts = {"tokens": self.tower_.texts.tokens, "slots": self.tower_.texts.slots}
        return {**texts, **self.network_.state_dict(prefix="network.")}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.tower_ = ContextTower(self.encoder, ContextTexts(state["tokens"], state["slots"]))
        network = with_prefix(state, "network.")
        with seeded(0):  # the initial h is drawn and then overwritten
            dim = network["shift.0.weight"].shape[1]
            self.network_ = ConditionalContexts(network["contexts"], dim, self.reduction)
        self.network_.load_state_dict(network)
        self.network_.eval().requires_grad_(False)
        return self
