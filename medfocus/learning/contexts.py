"""The base of methods that learn the context vectors of prompts by SGD through the frozen text tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from medfocus.clip.prompt_learning import check_prompt_learning, train_sgd
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.training import Schedule


@dataclass
class ContextMethod(Schedule, FeatureMethod):
    """A method whose prompts have learned contexts."""

    takes_views: ClassVar[bool] = True
    name: ClassVar[str]  # for messages
    contexts: int  # M
    start: str  # text of M tokens that initialises the contexts; empty: N(0, 0.02)
    max_steps: int  # upper bound on optimisation steps
    warmup: int  # epochs at 1e-5

    def check(self, **counts: int) -> None:
        """Raise ValueError for a hyperparameter out of range; ``counts`` are further ones of at least 1."""
        check_prompt_learning(
            self.name,
            contexts=self.contexts,
            epochs=self.epochs,
            warmup=self.warmup,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            **counts,
        )

    @property
    def needs_towers(self) -> bool:
        """See ``Method.needs_towers``."""
        return True

    def train(
        self,
        parameters: Iterable[nn.Parameter],
        accumulate: Callable[[Tensor, Tensor], None],
        features: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Train on features (V, N, D); see ``train_sgd`` for ``accumulate``."""
        train_sgd(
            parameters,
            accumulate,
            features.shape[1],
            views=len(features),
            epochs=self.epochs,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            generator=generator,
        )
