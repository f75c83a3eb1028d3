"""Base classes of methods, by the frozen part that computes their inputs.

The cache key of these inputs covers the source of the module that defines ``embed``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from medfocus.learning.method import IMAGES, Method


@dataclass
class FeatureMethod(Method):
    """A method on CLIP's frozen image features."""

    @property
    def embedding(self) -> str:
        """CLIP's image features."""
        return "features"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> L2-normalised image features (B, D)."""
        return self.encoder.encode_images(self.encoder.preprocess(images))


@dataclass
class ImageMethod(Method):
    """A method on the images themselves, without a frozen part."""

    @property
    def embedding(self) -> str:
        """The images."""
        return IMAGES

    def embed(self, images: Tensor) -> Tensor:
        """Return the images (B, S, S, C) uint8 unchanged."""
        return images
