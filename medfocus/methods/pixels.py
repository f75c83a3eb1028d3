"""The honesty row: logistic regression on the pixels of a tiny grey picture, without any network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medfocus.methods.protocol import Support
from medfocus.probe import Probe, fit_probe

if TYPE_CHECKING:
    from medfocus.encoders import ClipEncoder


@dataclass
class Pixels:
    """Standardised grey pixels -> logistic regression. A method that does not beat it has learnt nothing."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = False
    encoder: ClipEncoder
    side: int  # pixels a side of the grey thumbnail
    folds: int  # of the cross-validation that chooses C
    probe_: Probe = field(init=False, repr=False)
    mean_: np.ndarray = field(init=False, repr=False)  # (side * side,)
    scale_: np.ndarray = field(init=False, repr=False)  # (side * side,)

    @property
    def embedding(self) -> str:
        """Independent of the encoder but for the views that it asks for."""
        return f"pixels-{self.side}"

    def embed(self, pictures: Tensor) -> Tensor:
        """Pictures (B, S, S, 3) uint8 -> grey thumbnails (B, side * side) in [0, 1]."""
        grey = pictures.float().mean(dim=3)[:, None] / 255  # (B, 1, S, S)
        small = functional.interpolate(grey, (self.side, self.side), mode="bilinear", antialias=True)
        return small.flatten(1)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Standardise by the support's own mean and deviation, then fit the probe."""
        pixels = support.inputs[0].double().numpy()
        self.mean_ = pixels.mean(axis=0)
        self.scale_ = np.maximum(pixels.std(axis=0), 1e-3)  # a constant pixel carries nothing
        self.probe_ = fit_probe(
            self._standardise(pixels),
            support.labels.numpy(),
            support.groups.numpy(),
            folds=self.folds,
            seed=generator.initial_seed() % 2**32,
        )
        return self

    def _standardise(self, pixels: np.ndarray) -> np.ndarray:
        return (
            (pixels - self.mean_) / self.scale_ / self.side
        )  # unit norm on average, as the probe's grid expects

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, side * side) -> logits (N, K)."""
        return {"probe": torch.from_numpy(self.probe_.logits(self._standardise(inputs.double().numpy())))}

    def state(self) -> dict[str, Tensor]:
        """Probe and standardisation."""
        return {
            **self.probe_.state(),
            "mean": torch.from_numpy(self.mean_),
            "scale": torch.from_numpy(self.scale_),
        }

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.probe_ = Probe.load(state)
        self.mean_, self.scale_ = state["mean"].numpy(), state["scale"].numpy()
        return self
