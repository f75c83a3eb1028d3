"""What a segmenter is: images in, one mask each out, and a key that names how they were made."""

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
    """The region of one image that the focus keeps, and how it was come by."""

    region: np.ndarray  # (H, W) bool, at the image's own resolution
    score: float  # in [0, 1]; 0 for identity
    status: str  # one of STATUSES

    @property
    def coverage(self) -> float:
        """Share of the image inside the region, in [0, 1]."""
        return float(self.region.mean())


class Segmenter(Protocol):
    """Anything that turns images into masks; see ``otsu`` and ``sam2``."""

    key: str  # sha256 hex of weights, settings and code: equal keys make equal masks

    @property
    def settings(self) -> SegmenterSettings:
        """Return the settings that it was built from."""
        ...

    @property
    def sam2(self) -> Sam2Segmenter | None:
        """Return the SAM2 that proposes its regions; None if it uses no SAM2."""
        ...

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Images, (H, W, 3) uint8 RGB each and of any sizes -> one mask each, in their order."""
        ...


def identity(height: int, width: int) -> Mask:
    """The last rung of the ladder: the whole image, m = 1, with score 0."""
    return Mask(np.ones((height, width), dtype=bool), 0.0, "identity")


def segmenter_key(segmenter: type, **settings: object) -> str:
    """Return the sha256 hex of a segmenter's settings (JSON types), its code and the image decoders' code."""
    return fingerprint(segmenter, decode, segmenter=segmenter.__name__, **settings)


def check_image(image: np.ndarray) -> np.ndarray:
    """Return ``image``, writeable (torch warns otherwise), if it is (H, W, 3) uint8; else ValueError."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"An image has shape {image.shape} and dtype {image.dtype}; "
            "segmenters take (H, W, 3) uint8 RGB, as medfocus.images.decode.read gives it."
        )
    return np.require(image, requirements=["C", "W"])
