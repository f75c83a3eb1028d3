"""Define the protocol of all segmenters, and the mask that they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from medfocus.images import decode
from medfocus.storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from medfocus.masks.sam2.segmenter import Sam2Segmenter
    from medfocus.masks.settings import SegmenterSettings

STATUSES = ("chosen", "relaxed", "box", "identity")  # the rungs of the fallback ladder, best first


@dataclass(frozen=True, eq=False)
class Mask:
    """The region of an image that the focus keeps, with its quality."""

    region: np.ndarray  # (H, W) bool, at the image's own resolution
    score: float  # in [0, 1]; 0 for identity
    status: str  # one of STATUSES

    @property
    def coverage(self) -> float:
        """Return the share of the image inside the region, in [0, 1]."""
        return float(self.region.mean())


class Segmenter(Protocol):
    """An object that turns images into masks, one thread at a time."""

    key: str  # sha256 hex of weights, settings and code; equal keys give equal masks

    @property
    def settings(self) -> SegmenterSettings:
        """Return the settings of this segmenter, or of the SAM2 behind it."""
        ...

    @property
    def sam2(self) -> Sam2Segmenter | None:
        """Return the plain SAM2 behind this segmenter; None if it uses no SAM2."""
        ...

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Segment images (H, W, 3) uint8 RGB of any sizes: one mask per image, in their order."""
        ...


def identity(height: int, width: int) -> Mask:
    """Return the last rung of the ladder: the whole image with score 0."""
    return Mask(np.ones((height, width), dtype=bool), 0.0, "identity")


def segmenter_key(segmenter: type, **settings: object) -> str:
    """Return the sha256 hex of a segmenter's settings (JSON types), its code and the code of ``decode``."""
    return fingerprint(segmenter, decode, segmenter=segmenter.__name__, **settings)


def check_image(image: np.ndarray) -> np.ndarray:
    """Return ``image`` as a writeable array for torch. Raises ValueError unless it is (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"An image has shape {image.shape} and dtype {image.dtype}; segmenters take (H, W, 3) uint8 RGB. "
            "Read it with medfocus.images.decode.read."
        )
    return np.require(image, requirements=["C", "W"])
