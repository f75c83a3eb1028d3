"""The base of methods that train inside both towers of CLIP, on images and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.frozen import ImageMethod
from medfocus.learning.method import Support, with_prefix
from medfocus.learning.training import Schedule, seeded, train


class Towers(Protocol):
    """Both towers of a CLIP, as one module whose parameters are what trains."""

    def __call__(self, images: Tensor) -> Tensor:
        """Encode views (B, S, S, C) uint8 as image features (B, D), each of length one."""
        ...

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts as text features (N, D), each of length one, with a gradient."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trained parameters."""
        ...

    def eval(self) -> Any:
        """Turn dropout off."""
        ...

    def state_dict(self, *, prefix: str) -> dict[str, Any]:
        """Return the trained parameters by name."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restore the trained parameters."""
        ...


@dataclass
class TowersMethod(ImageMethod):
    """The logits are s I Tᵀ of the trained towers, and the loss is their cross-entropy.

    The prompts are those of the first template; every step encodes them again.
    """

    takes_views: ClassVar[bool] = True
    name: ClassVar[str]  # for messages
    max_steps: int | None  # upper bound on optimisation steps; the first epoch always runs in full
    batch_size: int
    lr: float
    weight_decay: float
    towers_: Any = field(init=False, repr=False)  # ``Towers``
    text_features_: Tensor = field(init=False, repr=False)  # (K, D) of the trained text tower

    @property
    def needs_towers(self) -> bool:
        """See ``Method.needs_towers``."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``Method.needs``."""
        return ("projections",)

    @abstractmethod
    def untrained(self) -> Towers:
        """Return the towers before training."""

    @abstractmethod
    def epochs_for(self, images: int, classes: int) -> int:
        """Return the epochs for a support of ``images`` images in ``classes`` classes."""

    def check(self, *more: str) -> None:
        """Raise ValueError for a hyperparameter out of range; ``more`` names further ones of at least 1."""
        for name in ("max_steps", "batch_size", *more):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{self.name}: {name} is {number}; use 1 or more.")

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train the towers on images and prompts.

        Raises ValueError if the support has no prompts, or if the towers cannot be trained.
        """
        if not support.prompts:
            raise ValueError(
                f"{self.name}: fit trains the text tower, but support.prompts is empty. Give the prompts of "
                "each class."
            )
        images, labels = support.inputs, support.labels  # (V, N, S, S, C), (N,)
        texts = [ensemble[0] for ensemble in support.prompts]  # (K,)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            features = towers(images[view, index])  # (B, D)
            logits = self.text_logits(features, towers.encode_texts(texts))  # (B, K)
            return functional.cross_entropy(logits, labels[index])

        with seeded(generator.initial_seed()):  # for initial values and dropout
            towers = self.untrained()
            train(
                towers.parameters(),
                loss,
                labels,
                Schedule(
                    epochs=self.epochs_for(len(labels), len(texts)),
                    batch_size=self.batch_size,
                    lr=self.lr,
                    weight_decay=self.weight_decay,
                ),
                views=len(images),
                generator=generator,
                max_steps=self.max_steps,
            )
        self.towers_ = towers.eval()
        with torch.no_grad():
            self.text_features_ = towers.encode_texts(texts)
        return self

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Images (N, S, S, C) uint8 -> logits (N, K)."""
        features = torch.cat([self.towers_(part) for part in inputs.split(64)])
        return {"text": self.text_logits(features, self.text_features_)}

    def state(self) -> dict[str, Tensor]:
        """Return the trained parameters and the text features."""
        return {"text_features": self.text_features_, **self.towers_.state_dict(prefix="towers.")}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.towers_ = self.untrained().eval()
        self.towers_.load_state_dict(with_prefix(state, "towers."))
        return self
