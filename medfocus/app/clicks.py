"""A mask by a reader's points: SAM2 answers from an image that was encoded once.

SAM2's own vocabulary (arXiv 2408.00714): point coords with labels, 1 inside of the region and 0 outside.
Only the prompt encoder and the mask decoder run. All points are one prompt; of SAM2's three candidates the
one counts that agrees with the most points, and of equals the one of the best predicted IoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from medfocus.masks.segmenter import Mask, Segmenter

if TYPE_CHECKING:
    from medfocus.masks.sam2.segmenter import Features, Sam2Segmenter

EDITED = "edited"  # a mask's status


class NothingThereError(ValueError):
    """SAM2 finds no region at the points."""


@dataclass(frozen=True)
class Point:
    """A place in an image, in shares of its width and height, that belongs to the region or does not."""

    x: float
    y: float
    inside: bool


def pointed(segmenter: Segmenter) -> Sam2Segmenter | None:
    """The SAM2 behind a segmenter, which takes points; None where there is none.

    What an adapter or a text chose is edited by SAM2 as it was.
    """
    return segmenter.sam2


def first_mask(segmenter: Segmenter, image: np.ndarray) -> tuple[Mask, Features | None]:
    """The mask of ``segmenter.segment``, and SAM2's encoding of the image where that was at hand."""
    import torch

    from medfocus.masks.sam2.segmenter import Sam2Segmenter
    from medfocus.masks.segmenter import check_image

    if not isinstance(segmenter, Sam2Segmenter) or segmenter.settings.strategy == "automatic":
        return segmenter.segment([image])[0], None
    image = check_image(image)
    with torch.inference_mode():
        features = segmenter.encode([image])
        return segmenter._mask(image, segmenter._found(features, 0)), features


def encode(segmenter: Sam2Segmenter, image: np.ndarray) -> Features:
    """An image (H, W, 3) uint8 through the image encoder."""
    import torch

    from medfocus.masks.segmenter import check_image

    with torch.inference_mode():
        return segmenter.encode([check_image(image)])


def mask_at(segmenter: Sam2Segmenter, image: np.ndarray, features: Features, points: Sequence[Point]) -> Mask:
    """What SAM2 finds at the points, at the image's resolution.

    Raises NothingThereError, and ValueError where no point lies inside: see ``deepest``.
    """
    import torch

    from medfocus.masks.sam2.segmenter import Prompts

    if not any(point.inside for point in points):
        raise ValueError("points: none lies inside, and SAM2 needs one; put `deepest` of a mask before them.")
    coords = np.array([[(point.x, point.y) for point in points]], np.float32)  # (1, N, 2)
    labels = np.array([[int(point.inside) for point in points]], np.int32)  # (1, N)
    with torch.inference_mode():
        logits, iou = segmenter.decode(features, 0, Prompts(coords, labels))  # (3, h, w), (3,)
    sound = [i for i in range(len(iou)) if np.isfinite(logits[i]).all() and np.isfinite(iou[i])]
    best = max(sound, key=lambda i: (agreeing(logits[i] > 0, points), iou[i]), default=None)
    region = None if best is None else segmenter._region(image, logits[best])
    if best is None or region is None or not region.any():
        raise NothingThereError("points: SAM2 finds no region there. Take the last one back, or set another.")
    return Mask(region, float(np.clip(iou[best], 0, 1)), EDITED)


def agreeing(region: np.ndarray, points: Sequence[Point]) -> int:
    """How many points a region (h, w) bool has on their side."""
    height, width = region.shape
    return sum(
        bool(region[min(int(p.y * height), height - 1), min(int(p.x * width), width - 1)]) == p.inside
        for p in points
    )


def deepest(region: np.ndarray) -> Point:
    """The point of a region (h, w) bool that is farthest from its edge; the frame is an edge, too."""
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(region, 1)))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), region.shape)
    return Point((int(column) + 0.5) / region.shape[1], (int(row) + 0.5) / region.shape[0], True)
