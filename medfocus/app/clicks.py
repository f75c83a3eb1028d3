"""Masks from a reader's points: SAM2 encodes an image once and decodes a mask for every change of points.

The vocabulary is SAM2's (arXiv 2408.00714): point coordinates with labels, 1 inside the region and 0 outside.
All points form one prompt, and SAM2 returns three candidates. The candidate that agrees with the most points
becomes the mask; predicted IoU breaks ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medfocus.masks import candidates
from medfocus.masks.quality import innermost
from medfocus.masks.sam2.segmenter import EncodedImages, PointPrompts, Sam2Segmenter
from medfocus.masks.segmenter import Mask, Segmenter, check_image

EDITED = "edited"  # the status of these masks


class NoRegionError(ValueError):
    """SAM2 finds no region at the points."""


@dataclass(frozen=True)
class Point:
    """A position in an image, as shares of its width and height, inside or outside the region."""

    x: float
    y: float
    inside: bool


def first_mask(segmenter: Segmenter, image: np.ndarray) -> tuple[Mask, EncodedImages | None]:
    """Segment an image (H, W, 3) uint8; also return its encoding by SAM2, if the segmenter makes one."""
    if not isinstance(segmenter, Sam2Segmenter) or segmenter.settings.strategy == "automatic":
        return segmenter.segment([image])[0], None
    encoded = encode(segmenter, image)
    with torch.inference_mode():
        return segmenter.mask(check_image(image), segmenter.ladder(encoded, 0)), encoded


def encode(segmenter: Sam2Segmenter, image: np.ndarray) -> EncodedImages:
    """Encode one image (H, W, 3) uint8 with SAM2."""
    with torch.inference_mode():
        return segmenter.encode([check_image(image)])


def mask_at(
    segmenter: Sam2Segmenter, image: np.ndarray, encoded: EncodedImages, points: Sequence[Point]
) -> Mask:
    """Return SAM2's mask for the points, at the image's resolution.

    Raises NoRegionError if SAM2 finds none, and ValueError if no point lies inside; see ``deepest``.
    """
    if not any(point.inside for point in points):
        raise ValueError("points: SAM2 needs at least one point inside. Add the point `deepest` of a mask.")
    best = segmenter.best(encoded, 0, _prompt(points))
    region = None if best is None else segmenter.region(image, best[0])
    if best is None or region is None or not region.any():
        raise NoRegionError("points: SAM2 finds no region there. Take the last point back, or set another.")
    return Mask(region, float(np.clip(best[1], 0, 1)), EDITED)


def followed(region: np.ndarray, points: Sequence[Point]) -> int:
    """Count the points on the correct side of a region (H, W) bool."""
    prompt = _prompt(points)
    return candidates.agreeing(region, prompt.coords[0], prompt.labels[0])


def _prompt(points: Sequence[Point]) -> PointPrompts:
    """Return one prompt of all points: P = 1."""
    coords = np.array([[(point.x, point.y) for point in points]], np.float32)
    return PointPrompts(coords, np.array([[int(point.inside) for point in points]], np.int32))


def deepest(region: np.ndarray) -> Point:
    """Return the point of a region (h, w) bool that is farthest from its edge and from the image's border."""
    return Point(*innermost(region), inside=True)
