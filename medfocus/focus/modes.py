"""Apply visual prompts, which are functions of an image and its mask, such as x_s = x ⊙ m.

The colour outside the mask is by default the mean of CLIP's training images, which is 0 after normalisation.
Black, the paper's x ⊙ m to the letter, is -1.8 standard deviations. Soft edges lie outside the mask, so the
region itself never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from medfocus.focus.crop import bounding_box
from medfocus.focus.marks import arrow, box, circle, contour
from medfocus.images.geometry import CLIP_MEAN, Colour
from medfocus.masks.candidates import connected

# Distinct on grey and from each other: red, azure, yellow, magenta, green, orange.
SEGMENT_COLOURS = ((230, 30, 40), (0, 140, 255), (250, 210, 0), (215, 60, 215), (40, 190, 70), (255, 130, 0))
TINT = 0.35  # opacity of a tinted segment
BLUR_SIGMA = 0.04  # of the longest side; keeps shapes and removes texture


def focus(
    image: np.ndarray, mask: np.ndarray, mode: str, *, feather: float, fill: Colour = CLIP_MEAN
) -> np.ndarray:
    """Apply one of ``FOCUS`` to an image at its own resolution.

    An empty mask stands for the whole image, m = 1. A blank image would instead show that the image has no
    region, which can reveal its class. Only "inverse" returns a blank image, because the background is empty.

    Args:
        image: (H, W, 3) uint8 RGB; it is not modified.
        mask: (H, W) bool, True inside the region.
        mode: A key of FOCUS.
        feather: Width of the soft edge as a share of the image's longest side, in [0, 0.5]. "multiply",
            "inverse", "binary" and "blur" use it.
        fill: The colour in place of what "multiply" and "inverse" hide.

    Returns:
        (H, W, 3) uint8; (H', W', 3) for "crop"; the image itself for "none".

    Raises ValueError for an unknown mode, or for an image, mask or feather of another shape, type or range.
    """
    if mode not in FOCUS:
        raise ValueError(f"focus {mode!r} is not known. Use one of {', '.join(FOCUS)}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"focus: the image is {image.dtype} {image.shape}. Pass (H, W, 3) uint8.")
    if mask.shape != image.shape[:2] or mask.dtype != bool:
        raise ValueError(f"focus: the mask is {mask.dtype} {mask.shape}. Pass bool {image.shape[:2]}.")
    if not 0 <= feather <= 0.5:
        raise ValueError(f"focus: feather is {feather}. Use a share of the longest side in [0, 0.5].")
    return FOCUS[mode](image, mask if mask.any() else np.ones_like(mask), feather, fill)


def none(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Return the image itself, the baseline for every focus."""
    return image


def multiply(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Show the image inside the mask and ``fill`` outside: the paper's x ⊙ m."""
    return _blend(image, Image.new("RGB", image.shape[1::-1], fill), soft_edge(mask, feather))


def inverse(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Show the background alone, x ⊙ (1 - m), as a control: the region has the colour ``fill``.

    The hole still shows the shape of the mask; "binary" measures the effect of the shape alone.
    """
    return _blend(image, Image.new("RGB", image.shape[1::-1], fill), 255 - soft_edge(mask, feather))


def overlay(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Tint each segment (connected part of the mask), the largest in red: the paper's Figure 1."""
    labels, count = connected(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    colour_of = np.zeros((count + 1, 3), dtype=np.uint8)
    for rank, part in enumerate(np.argsort(-sizes, kind="stable")):
        colour_of[1 + part] = SEGMENT_COLOURS[rank % len(SEGMENT_COLOURS)]
    tinted = np.where(mask, np.uint8(round(255 * (1 - TINT))), np.uint8(255))
    return _blend(image, Image.fromarray(colour_of[labels]), tinted)


def binary(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Show the shape of the mask alone, white on black."""
    return np.repeat(soft_edge(mask, feather)[:, :, None], 3, axis=2)


def crop(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Cut out a square around the mask's bounding box (w, h), as far as it lies inside the image (W, H).

    Half of the square's side is max(0.5 w, 0.5 h, 0.2 W, 0.2 H).
    """
    return image[crop_window(mask)].copy()


def crop_window(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and the columns that ``crop`` shows of a non-empty mask's image."""
    height, width = mask.shape
    top, bottom, left, right = bounding_box(mask)
    half = max(0.5 * (right - left), 0.5 * (bottom - top), 0.2 * width, 0.2 * height)
    y, x = (top + bottom) / 2, (left + right) / 2
    rows = slice(max(0, math.floor(y - half)), min(height, math.ceil(y + half)))
    return rows, slice(max(0, math.floor(x - half)), min(width, math.ceil(x + half)))


def blur(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Show the image inside the mask and a blurred image outside, so that the region keeps its context."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR_SIGMA * max(mask.shape)))
    return _blend(image, blurred, soft_edge(mask, feather))


FOCUS: dict[str, Callable[[np.ndarray, np.ndarray, float, Colour], np.ndarray]] = {
    "none": none,
    "multiply": multiply,
    "inverse": inverse,
    "overlay": overlay,
    "binary": binary,
    "crop": crop,
    "blur": blur,
    "contour": contour,
    "circle": circle,
    "box": box,
    "arrow": arrow,
}


def soft_edge(mask: np.ndarray, feather: float) -> np.ndarray:
    """Return weights (H, W) uint8 of a mask (H, W) bool: 255 inside, falling to 0 outside.

    The soft edge is ``feather`` times the longest side wide. A weight outside is twice the share of the mask
    in a square window, so that it falls linearly away from a straight edge. The share is counted in integers,
    so that a rotated mask gives the same bits.
    """
    radius = round(feather * max(mask.shape))
    if radius == 0:
        return mask.astype(np.uint8) * np.uint8(255)
    side = 2 * radius + 1
    count = np.pad(mask, radius, mode="edge").astype(np.int32)
    for _ in ("down the columns", "along the rows"):
        sums = np.vstack([np.zeros_like(count[:1]), count]).cumsum(0, dtype=np.int32)
        count = (sums[side:] - sums[:-side]).T
    soft = np.minimum(count * np.float32(510 / side**2), 255).astype(np.uint8)
    soft[mask] = 255
    return soft


def _blend(inside: np.ndarray, outside: Image.Image, weight: np.ndarray) -> np.ndarray:
    """Blend two images by ``weight`` (H, W) uint8: 255 gives ``inside``, 0 gives ``outside``."""
    return np.array(Image.composite(Image.fromarray(inside), outside, Image.fromarray(weight)))
