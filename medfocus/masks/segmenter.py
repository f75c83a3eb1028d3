"""What a segmenter is: images in, one mask each out, and a key that names how they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from medfocus.images import decode

STATUSES = ("chosen", "relaxed", "box", "identity")  # the rungs of the fallback ladder, best first
# Between an image and its mask, in the folder of this file.
_SOURCES = (
    "candidates.py", "otsu.py", "segmenter.py", "sam2/edges.py", "sam2/model.py", "sam2/segmenter.py",
)  # fmt: skip


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

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Images, (H, W, 3) uint8 RGB each and of any sizes -> one mask each, in their order."""
        ...


def identity(height: int, width: int) -> Mask:
    """The last rung of the ladder: the whole image, m = 1, with score 0."""
    return Mask(np.ones((height, width), dtype=bool), 0.0, "identity")


def settings_key(name: str, settings: Mapping[str, object]) -> str:
    """sha256 hex over a segmenter's name, its settings (JSON types) and the code that makes masks."""
    content = {"segmenter": name, "code": code_digest(Path(__file__).parents[1]), "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def code_digest(package: Path) -> str:
    """sha256 hex over the sources between an image's bytes and its mask, in a copy of this package.

    Where masks are kept changes none.
    """
    digest = hashlib.sha256()
    sources = [*(f"masks/{name}" for name in _SOURCES), *(f"images/{name}" for name in decode.SOURCES)]
    for path in (package / name for name in sources):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_image(image: np.ndarray) -> np.ndarray:
    """Return ``image``, writeable (torch warns otherwise), if it is (H, W, 3) uint8; else ValueError."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"An image has shape {image.shape} and dtype {image.dtype}; "
            "segmenters take (H, W, 3) uint8 RGB, as medfocus.images.decode.read gives it."
        )
    return np.require(image, requirements=["C", "W"])
