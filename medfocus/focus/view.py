"""Make views, the input of the encoder, from an image and its mask by augmentation, focus and frame."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from medfocus.clip.regions import REGIONS
from medfocus.focus.augment import WHOLE, Augmentation
from medfocus.focus.modes import focus as apply_focus
from medfocus.images import decode
from medfocus.images.geometry import BLACK, Frame
from medfocus.storage.fingerprint import fingerprint

FILLS = ("mean", "black")


def view(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    focus: str,
    frame: Frame,
    feather: float,
    fill: str = "mean",
    change: Augmentation = WHOLE,
) -> np.ndarray:
    """Make a view (S, S, C) uint8 from an image (H, W, 3) uint8 and a mask (H, W) bool.

    A focus in FOCUS makes three channels. A focus in REGIONS adds the region in further channels of the same
    frame: "alpha" and "attention" add the mask, 255 inside (C = 4); "dual" and "dual-crop" add the image
    with the focus "multiply" or "crop" (C = 6). If the frame cuts off the whole region, the region is the
    whole image.

    Args:
        image: RGB, at its own resolution.
        mask: True inside the region. It may be None for the focus "none".
        focus: A key of ``medfocus.focus.modes.FOCUS`` or ``medfocus.clip.regions.REGIONS``.
        frame: The encoder's input, ``ClipEncoder.frame``.
        feather: Width of the soft edge as a share of the longest side.
        fill: One of FILLS, the colour in place of what the focus hides: CLIP's mean colour or black.
        change: A result of ``augmentation``. If it keeps less than half of the mask, the view shows the whole
            image, with the same tone and mirrored in the same way.

    Raises ValueError for a missing mask or an unknown fill, and as ``medfocus.focus.modes.focus`` does.
    """
    if fill not in FILLS:
        raise ValueError(f"views: fill is {fill!r}. Use one of {', '.join(FILLS)}.")
    if focus == "none":
        return frame.image(change.image(image, frame.padding))
    if mask is None:
        raise ValueError(f"focus '{focus}' needs a mask, and this image has none. Make its mask first.")
    if focus in REGIONS and not mask.any():
        mask = np.ones_like(mask)
    change = change.keeping(mask)
    image, mask = change.image(image, frame.padding), change.mask(mask)
    mode = REGIONS[focus].focused if focus in REGIONS else focus
    if frame.resize == "shortest" and mode != "crop" and not frame.mask(mask).any():
        mask = np.ones_like(mask)
    if mode is None:
        inside = np.rint(255 * frame.mask(mask)).astype(np.uint8)  # (S, S)
        return np.concatenate([frame.image(image), inside[..., None]], axis=2)
    colour = frame.mean if fill == "mean" else BLACK
    focused = frame.image(apply_focus(image, mask, mode, feather=feather, fill=colour))
    return np.concatenate([frame.image(image), focused], axis=2) if focus in REGIONS else focused


def visible(view: np.ndarray) -> np.ndarray:
    """Return the channels to show of a view (S, S, C): RGB, or the focused image if the view has two."""
    return view[..., -3:] if view.shape[2] == 6 else view[..., :3]


def view_key(*, focus: str, frame: Frame, feather: float, fill: str = "mean") -> str:
    """Return the key of views in caches, from their settings and all code from the image file to the view."""
    return fingerprint(view, decode, focus=focus, frame=asdict(frame), feather=feather, fill=fill)
