"""CoOp (Zhou et al., arXiv 2109.01134): learned context vectors around the class name in a prompt.

t_k = g([v_1..v_M][class_k]), and the logits are s f t_k for frozen image features f; the contexts v learn by
cross-entropy through the frozen text tower g. The published settings are M = 16 contexts from N(0, 0.02), or
M = 4 that start at "a photo of a"; SGD with learning rate 2e-3 and a cosine, after one epoch at 1e-5; batches
of 32; and 50 epochs for 1 shot, 100 for 2 to 4, 200 for 8 to 16.

Deviations from the paper: each step draws its views from a few cached views instead of augmenting anew. The
small schedule bounds the training by ``max_steps``, because 200 epochs of 5,700 images would be 36,000 steps
of the text tower. It covers the same epochs in fewer steps, for which the published learning rate may be too
small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.clip.prompt_learning import CLASS_TOKENS, ContextTower, start_contexts, write_texts
from medfocus.learning.contexts import ContextMethod, train_sgd
from medfocus.learning.method import Support


@dataclass
class CoOp(ContextMethod):
    """Trains only the contexts. All classes share them, or each class has its own."""

    learned: ClassVar[tuple[str, ...]] = ("text_features", "contexts")
    name: ClassVar[str] = "coop"
    class_token: str  # position of the class name: "end", "middle" or "front"
    class_specific: bool  # separate contexts for each class
    contexts_: Tensor = field(init=False, repr=False)  # (1, M, W), or (K, M, W) where class-specific
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    def __post_init__(self) -> None:
        self.check()
        if self.class_token not in CLASS_TOKENS:
            raise ValueError(
                f"coop: class_token '{self.class_token}' is not known; use one of {', '.join(CLASS_TOKENS)}."
            )

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train the contexts on frozen image features.

        Raises ValueError as ``write_texts`` and ``start_contexts`` do.
        """
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        texts = write_texts("coop", self.encoder, support.class_names, self.contexts, self.class_token)
        tower = ContextTower(self.encoder, texts)
        sets = len(texts.tokens) if self.class_specific else 1  # sets of contexts, each with its own noise
        start = [
            start_contexts("coop", self.encoder, self.contexts, self.start, generator) for _ in range(sets)
        ]
        contexts = nn.Parameter(torch.stack(start))  # (1, M, W) or (K, M, W)

        def accumulate(index: Tensor, view: Tensor) -> None:
            logits = self.text_logits(features[view, index], tower(contexts[None])[0])  # (B, K)
            functional.cross_entropy(logits, labels[index]).backward()

        train_sgd(
            [contexts],
            accumulate,
            len(labels),
            self.schedule_for(len(labels), len(texts.tokens)),
            views=len(features),
            generator=generator,
        )
        self.contexts_ = contexts.detach()
        with torch.no_grad():
            self.text_features_ = tower(self.contexts_[None])[0]
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"text": self.text_logits(inputs.float(), self.text_features_)}
