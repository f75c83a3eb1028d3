"""What the encoder takes: image and mask are cropped together, then focused, then letterboxed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from medfocus.focus.modes import FILL
from medfocus.focus.modes import focus as apply_focus
from medfocus.images.decode import letterbox
from medfocus.storage.fingerprint import fingerprint

AREA = (0.5, 1.0)  # share of the image that a random crop keeps, as the method's authors have it
_KEPT = 0.5  # share of the mask that has to be left in a crop


class Crop(NamedTuple):
    """The part of an image that a view shows, in shares of its width and height."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool


def crop_box(sha256: str, view: int, *, mirror: bool = False) -> Crop:
    """The crop of one view of an image: view 0 is the whole image, the others are random and repeatable.

    The draw depends on the image's ``sha256`` (hex) and ``view`` alone, so a view can be cached. A crop has
    the aspect ratio of its image: its letterboxed view then has the padding of the whole image's view.
    With ``mirror`` half of the random views are mirrored left to right; never ask this of chest films, where
    the heart's side is a finding.
    """
    if view == 0:
        return Crop(0, 0, 1, 1, False)
    rng = np.random.default_rng([int(sha256, 16), view])
    side = rng.uniform(*AREA) ** 0.5
    left, top = rng.uniform(0, 1 - side, size=2)
    return Crop(left, top, left + side, top + side, mirror and bool(rng.random() < 0.5))


def view(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    focus: str,
    size: int,
    feather: float,
    crop: Crop | None = None,
) -> np.ndarray:
    """Image (H, W, 3) uint8 and mask (H, W) bool -> view (S, S, 3) uint8.

    A crop that leaves less than half of the mask is not taken, as it would show the focus something else than
    the region: the whole image is, mirrored if the crop is.

    Args:
        image: RGB, at its own resolution.
        mask: True inside the region; None will do for focus "none".
        focus: A key of ``medfocus.focus.modes.FOCUS``.
        size: S, pixels a side; the longest side fills it, the rest is CLIP's mean colour.
        feather: Width of the soft edge as a share of the longest side of what the crop leaves.
        crop: What ``crop_box`` draws; None is the whole image.

    Raises ValueError for an absent mask, and as ``medfocus.focus.modes.focus`` does.
    """
    if focus == "none":
        mask = None
    elif mask is None:
        raise ValueError(f"focus '{focus}' needs a mask, and this image has none. Make its mask first.")
    if crop is not None:
        if mask is not None and mask[_window(mask, crop)].sum() < _KEPT * mask.sum():
            crop = Crop(0, 0, 1, 1, crop.mirrored)
        image, mask = cut(image, crop), None if mask is None else cut(mask, crop)
    focused = image if mask is None else apply_focus(image, mask, focus, feather=feather)
    return letterbox(focused, size, FILL)


def view_key(*, focus: str, size: int, feather: float) -> str:
    """sha256 hex over the settings of ``view`` and the code behind it: names views in cache keys."""
    return fingerprint(view, focus=focus, size=size, feather=feather)


def cut(plane: np.ndarray, crop: Crop) -> np.ndarray:
    """What a crop leaves of an image (H, W, 3) or a mask (H, W), mirrored if the crop is."""
    rows, columns = _window(plane, crop)
    return np.ascontiguousarray(plane[rows, columns][:, :: -1 if crop.mirrored else 1])


def _window(plane: np.ndarray, crop: Crop) -> tuple[slice, slice]:
    height, width = plane.shape[:2]
    top, left = round(crop.top * height), round(crop.left * width)
    return (
        slice(top, max(top + 1, round(crop.bottom * height))),
        slice(left, max(left + 1, round(crop.right * width))),
    )
