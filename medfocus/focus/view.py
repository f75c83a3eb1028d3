"""Make views, the input of the encoder, from an image and its mask by crop, focus and letterbox."""

from __future__ import annotations

import numpy as np

from medfocus.clip.regions import REGIONS
from medfocus.focus.crop import Crop, cut, keep_region
from medfocus.focus.modes import FILL
from medfocus.focus.modes import focus as apply_focus
from medfocus.images import decode
from medfocus.images.geometry import letterbox, letterbox_mask
from medfocus.storage.fingerprint import fingerprint


def view(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    focus: str,
    size: int,
    feather: float,
    crop: Crop | None = None,
) -> np.ndarray:
    """Make a view (S, S, C) uint8 from an image (H, W, 3) uint8 and a mask (H, W) bool.

    A focus in FOCUS makes three channels. A focus in REGIONS adds the region in further channels of the same
    frame: "alpha" and "attention" add the mask, 255 inside (C = 4), and "dual" adds the image with the focus
    "multiply" (C = 6).

    Args:
        image: RGB, at its own resolution.
        mask: True inside the region. It may be None for the focus "none".
        focus: A key of ``medfocus.focus.modes.FOCUS`` or ``medfocus.clip.regions.REGIONS``.
        size: S, pixels per side. The longest side of the image fills it; the rest has CLIP's mean colour.
        feather: Width of the soft edge as a share of the longest side of the crop.
        crop: A result of ``crop_box``; None is the whole image. If the crop keeps less than half of the mask,
            the view shows the whole image, mirrored if the crop is mirrored.

    Raises ValueError for a missing mask, and as ``medfocus.focus.modes.focus`` does.
    """
    if focus == "none":
        return _focused_view(image, None, focus, size, feather, crop)
    if mask is None:
        raise ValueError(f"focus '{focus}' needs a mask, and this image has none. Make its mask first.")
    if focus not in REGIONS:
        crop = crop and keep_region(crop, mask)
        return _focused_view(image, mask, focus, size, feather, crop)
    mask = mask if mask.any() else np.ones_like(mask)
    crop = crop and keep_region(crop, mask)
    raw = _focused_view(image, None, "none", size, feather, crop)  # (S, S, 3)
    if REGIONS[focus].has_focused_image:
        return np.concatenate([raw, _focused_view(image, mask, "multiply", size, feather, crop)], axis=2)
    inside = letterbox_mask(mask if crop is None else cut(mask, crop), size)  # (S, S) in [0, 1]
    return np.concatenate([raw, np.rint(255 * inside).astype(np.uint8)[..., None]], axis=2)


def visible(view: np.ndarray) -> np.ndarray:
    """Return the channels to show of a view (S, S, C): RGB, or the focused image if the view has two."""
    return view[..., -3:] if view.shape[2] == 6 else view[..., :3]


def _focused_view(
    image: np.ndarray, mask: np.ndarray | None, focus: str, size: int, feather: float, crop: Crop | None
) -> np.ndarray:
    """Return the view (S, S, 3) uint8 of one image, without a focus if ``mask`` is None."""
    if crop is not None:
        image, mask = cut(image, crop), None if mask is None else cut(mask, crop)
    focused = image if mask is None else apply_focus(image, mask, focus, feather=feather)
    return letterbox(focused, size, FILL)


def view_key(*, focus: str, size: int, feather: float) -> str:
    """Return the key of views in caches, from their settings and all code from the image file to the view."""
    return fingerprint(view, decode, focus=focus, size=size, feather=feather)
