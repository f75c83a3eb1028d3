"""Views for a focus inside the encoder: the image, and beside it in further channels its region."""

from __future__ import annotations

import numpy as np

from medfocus.clip.regions import REGIONS
from medfocus.focus.view import Crop, cut, view, view_key
from medfocus.images.decode import letterbox_mask
from medfocus.storage.fingerprint import fingerprint

_KEPT = 0.5  # share of the region that has to be left in a crop, as in ``view``


def focused_view(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    focus: str,
    size: int,
    feather: float,
    crop: Crop | None = None,
) -> np.ndarray:
    """The view of any focus: ``region_view`` for one of REGIONS, else ``medfocus.focus.view.view``.

    Raises as they do.
    """
    if focus not in REGIONS:
        return view(image, mask, focus=focus, size=size, feather=feather, crop=crop)
    if mask is None:
        raise ValueError(f"focus '{focus}' needs a mask, and this image has none. Make its mask first.")
    return region_view(image, mask, mode=focus, size=size, feather=feather, crop=crop)


def focused_view_key(*, focus: str, size: int, feather: float) -> str:
    """sha256 hex over the settings of ``focused_view`` and the code behind it: names views in cache keys."""
    if focus not in REGIONS:
        return view_key(focus=focus, size=size, feather=feather)
    return fingerprint(region_view, focus=focus, size=size, feather=feather)


def region_view(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    mode: str,
    size: int,
    feather: float,
    crop: Crop | None = None,
) -> np.ndarray:
    """Image (H, W, 3) uint8 and mask (H, W) bool -> view (S, S, C) uint8, in one frame.

    Args:
        image: RGB, at its own resolution.
        mask: True inside the region; an empty one is read as the whole image.
        mode: "alpha" and "attention" give the image and the region as a fourth channel, 255 inside;
            "dual" gives the image and its "multiply" focus, six channels.
        size: S, pixels a side.
        feather: Of "multiply"; see ``medfocus.focus.view.view``.
        crop: What ``crop_box`` draws; one that leaves less than half of the mask is not taken.

    Raises ValueError for another mode.
    """
    if mode not in REGIONS:
        raise ValueError(f"region {mode!r} is not known; use one of {', '.join(REGIONS)}.")
    mask = mask if mask.any() else np.ones_like(mask)
    if crop is not None and cut(mask, crop).sum() < _KEPT * mask.sum():
        crop = Crop(0, 0, 1, 1, crop.mirrored)
    raw = view(image, None, focus="none", size=size, feather=feather, crop=crop)  # (S, S, 3)
    if mode == "dual":
        focused = view(image, mask, focus="multiply", size=size, feather=feather, crop=crop)
        return np.concatenate([raw, focused], axis=2)  # (S, S, 6)
    shown = mask if crop is None else cut(mask, crop)
    region = np.rint(255 * letterbox_mask(shown, size)).astype(np.uint8)  # (S, S)
    return np.concatenate([raw, region[..., None]], axis=2)  # (S, S, 4)
