"""The interface of every method, and the support set that it learns from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


IMAGES = "images"  # the ``embedding`` of a method that trains on images: ``embed`` returns them, uint8


@dataclass(frozen=True)
class Support:
    """The labelled images that a method may learn from, after its ``embed``."""

    inputs: Tensor  # (V, N, ...) V views of N images; view 0 is the unaugmented image
    labels: Tensor  # (N,) int64, covering 0..K-1
    groups: Tensor  # (N,) int64; images of one patient or of one group of duplicates share a number
    text_features: Tensor  # (K, D) L2-normalised text features of the classes
    class_names: tuple[str, ...] = ()  # (K,) the words for each class, for methods that write prompts
    prompts: tuple[tuple[str, ...], ...] = ()  # (K, templates) the prompts behind ``text_features``

    def subset(self, index: np.ndarray) -> Support:
        """Return the support of the images at ``index`` (M,)."""
        at = torch.as_tensor(index, dtype=torch.int64)
        return replace(self, inputs=self.inputs[:, at], labels=self.labels[at], groups=self.groups[at])


@dataclass
class Method(ABC):
    """A classifier that is built from hyperparameters and fitted on a support set.

    The names of learned attributes end in an underscore.
    """

    learns: ClassVar[bool] = True  # False: ``fit`` ignores the labels
    takes_views: ClassVar[bool] = False  # True: ``fit`` trains on augmented views too
    learned: ClassVar[tuple[str, ...]] = ()  # tensors of a method that keeps nothing else: "means" for means_
    encoder: ClipEncoder
    # A mirrored image has the same class; a method may average over both. A fact of the data set, not a
    # hyperparameter.
    flip: bool = field(default=False, kw_only=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The hyperparameters and ``flip``, by the names of the constructor's arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "encoder"}

    def views(self, images: int, augmented: int) -> int:
        """Return the number of views of each of ``images`` training images for ``fit``.

        ``augmented`` is the usual number of views besides the whole image.
        """
        return 1 + augmented if self.takes_views else 1

    @property
    def needs_towers(self) -> bool:
        """True if ``fit`` runs more of the encoder than its last ``trained_blocks`` blocks."""
        return False

    @property
    def trained_blocks(self) -> int:
        """Number of last blocks that ``fit`` runs and may train; see ``ClipEncoder.tail``."""
        return 0

    @property
    def runs_encoder(self) -> bool:
        """True if ``fit`` runs an encoder, and not only on its cached outputs; refits are then slow."""
        return self.needs_towers or self.trained_blocks > 0

    @property
    def needs(self) -> tuple[str, ...]:
        """The verbs of the towers that this method uses: keys of ``medfocus.clip.towers.base.VERBS``."""
        return ()

    def check_towers(self, caller: str) -> None:
        """Raise ValueError if the encoder's towers lack something that this method uses; nothing is computed.

        The message begins with ``caller``.
        """
        self.encoder.require(self.needs, caller)
        if self.trained_blocks:
            self.encoder.check_blocks(self.trained_blocks, caller)

    @property
    def note(self) -> str:
        """A remark for the tables, such as the source of weights or a choice by the support; may be empty."""
        return ""

    @property
    @abstractmethod
    def embedding(self) -> str:
        """Name of the frozen part, for cache keys: equal names on one encoder mean equal inputs."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Run the frozen part: images (B, S, S, C) uint8 -> inputs (B, ...)."""

    def text_logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """s I Tᵀ, the class logits of CLIP: (B, D), (K, D) -> (B, K)."""
        return self.encoder.logit_scale * image_features @ text_features.T

    @abstractmethod
    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Learn from the support and nothing else."""

    @abstractmethod
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, ...) -> class logits (N, K) of each classifier, the main classifier first."""

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that ``load`` needs to restore the fitted method: those of ``learned``."""
        return {name: getattr(self, f"{name}_") for name in self.learned}

    def load(self, state: dict[str, Tensor]) -> Self:
        """Restore the fitted method from the ``state`` of a method with the same settings."""
        for name in self.learned:
            setattr(self, f"{name}_", state[name])
        return self


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors that have ``prefix`` in their names, named without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
