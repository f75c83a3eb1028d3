"""What every method is: an estimator over the frozen part's output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


IMAGES = "images"  # the ``embedding`` of a method that trains on images: ``embed`` returns them, uint8


@dataclass(frozen=True)
class Support:
    """The labelled images a method may learn from, as its frozen part saw them."""

    inputs: Tensor  # (V, N, ...) V views of N images; view 0 is the unaugmented one
    labels: Tensor  # (N,) int64, covering 0..K-1
    groups: Tensor  # (N,) int64; images of one patient or duplicate group share a number
    text_features: Tensor  # (K, D) L2-normalised class texts
    class_names: tuple[
        str, ...
    ] = ()  # (K,) the words for each class, for methods that write texts themselves
    prompts: tuple[tuple[str, ...], ...] = ()  # (K, templates) the texts behind ``text_features``

    def subset(self, index: np.ndarray) -> Support:
        """The support restricted to the images at ``index`` (M,)."""
        at = torch.as_tensor(index, dtype=torch.int64)
        return replace(self, inputs=self.inputs[:, at], labels=self.labels[at], groups=self.groups[at])


class Method(Protocol):
    """An estimator: hyperparameters at construction, images at ``fit``, learned names end in _."""

    encoder: ClipEncoder
    learns: ClassVar[bool]  # False: the support does not matter
    takes_views: ClassVar[bool]  # True: trains on augmented views beside the whole image

    @property
    def needs_towers(self) -> bool:
        """True where ``fit`` runs more of the encoder than the end of it that trains."""
        ...

    @property
    def embedding(self) -> str:
        """Name of the frozen part, for cache keys: equal names embed equally under one encoder."""
        ...

    def embed(self, images: Tensor) -> Tensor:
        """The frozen part: images (B, S, S, 3) uint8 -> inputs (B, ...)."""
        ...

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Learn from the support and nothing else."""
        ...

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, ...) -> class logits (N, K) of each of the method's classifiers, the main one first."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything ``load`` needs to predict again without ``fit``."""
        ...

    def load(self, state: dict[str, Tensor]) -> Self:
        """Take the state that another instance with the same settings returned."""
        ...
