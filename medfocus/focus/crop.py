"""Cut parts out of an image: random crops for its views, and the bounding box of its mask."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

AREA = (0.5, 1.0)  # share of the image that a random crop keeps, as in the public code of the paper
_KEPT = 0.5  # share of the mask that a crop has to keep at least


class Crop(NamedTuple):
    """The visible part of an image, in shares of its width and height."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool


def crop_box(sha256: str, view: int, *, mirror: bool = False) -> Crop:
    """Return the crop of a view: view 0 is the whole image, the others are random and reproducible.

    The draw depends on the image's ``sha256`` (hex) and ``view`` alone, so a view can be cached. A crop has
    the aspect ratio of its image, so all views have the same padding. With ``mirror``, half of the random
    views are mirrored left to right; do not use it for chest X-rays, where the heart's side is a finding.
    """
    if view == 0:
        return Crop(0, 0, 1, 1, False)
    rng = np.random.default_rng([int(sha256, 16), view])
    side = rng.uniform(*AREA) ** 0.5
    left, top = rng.uniform(0, 1 - side, size=2)
    return Crop(left, top, left + side, top + side, mirror and bool(rng.random() < 0.5))


def cut(plane: np.ndarray, crop: Crop) -> np.ndarray:
    """Cut a crop out of an image (H, W, 3) or a mask (H, W), and mirror it if the crop is mirrored."""
    rows, columns = _window(plane, crop)
    return np.ascontiguousarray(plane[rows, columns][:, :: -1 if crop.mirrored else 1])


def _window(plane: np.ndarray, crop: Crop) -> tuple[slice, slice]:
    height, width = plane.shape[:2]
    top, left = round(crop.top * height), round(crop.left * width)
    return (
        slice(top, max(top + 1, round(crop.bottom * height))),
        slice(left, max(left + 1, round(crop.right * width))),
    )


def keep_region(crop: Crop, mask: np.ndarray) -> Crop:
    """Return ``crop``, or a crop of the whole image if ``crop`` keeps less than half of ``mask``."""
    if mask[_window(mask, crop)].sum() < _KEPT * mask.sum():
        return Crop(0, 0, 1, 1, crop.mirrored)
    return crop


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of a non-empty mask; bottom and right are exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1
