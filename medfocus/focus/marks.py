"""Draw a red mark around a region as a visual prompt: contour, circle, box or arrow.

A mark lies outside the region, so that it hides no part of the region, and ends at the edges of the image. A
region that fills the image has no visible mark.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from medfocus.focus.crop import bounding_box
from medfocus.images.geometry import Colour
from medfocus.masks.candidates import connected

MARK_COLOUR = (255, 0, 0)  # red marks attract CLIP's attention, arXiv 2304.06712
MARK_WIDTH = 3 / 224  # of the longest side: 3 pixels of CLIP's input
ARROW_LENGTH, ARROW_HEAD = 12, 4  # in mark widths; the head is as broad as it is long
# (down, right). Of two directions with equal space, the first wins.
DIRECTIONS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1))


def contour(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Draw a red line around the mask."""
    return _marked(image, _line_around(mask))


def circle(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Draw the smallest red ellipse that encloses the mask and has the centre and proportions of its box."""
    top, bottom, left, right = bounding_box(mask)
    y = np.abs(np.arange(mask.shape[0])[:, None] - (top + bottom - 1) / 2)  # (H, 1) from the centre
    x = np.abs(np.arange(mask.shape[1]) - (left + right - 1) / 2)  # (W,)
    down, across = (bottom - top) / 2, (right - left) / 2  # the half axes of the ellipse inside the box
    farthest = (((y + 0.5) / down) ** 2 + ((x + 0.5) / across) ** 2)[mask].max()  # outer corners of pixels
    return _marked(image, _line_around((y / down) ** 2 + (x / across) ** 2 <= farthest))


def box(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Draw a red rectangle around the mask's bounding box."""
    top, bottom, left, right = bounding_box(mask)
    inside = np.zeros_like(mask)
    inside[top:bottom, left:right] = True
    return _marked(image, _line_around(inside))


def arrow(image: np.ndarray, mask: np.ndarray, feather: float, fill: Colour) -> np.ndarray:
    """Draw a red arrow at the mask's border that points at the centre of the mask's largest part.

    Of eight directions, choose the direction with space for the largest arrow. The arrow is 36 pixels long in
    CLIP's input, or shorter if there is less space.
    """
    labels, _ = connected(mask)
    top, bottom, left, right = bounding_box(labels == 1 + np.bincount(labels.ravel())[1:].argmax())
    centre = (top + bottom - 1) // 2, (left + right - 1) // 2
    arrows = [(tip, _unit(d)) for d in DIRECTIONS if (tip := _border(mask, centre, d)) is not None]
    tip, outwards = max(arrows, key=lambda arrow: _largest_width(mask.shape, *arrow))
    width = min(_mark_width(mask), _largest_width(mask.shape, tip, outwards))
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    y, x = y + 0.5 - tip[0], x + 0.5 - tip[1]
    along = y * outwards[0] + x * outwards[1]  # (H, W) pixels from the tip to the arrow's tail
    half = np.where(along <= ARROW_HEAD * width, along / 2, width / 2)
    drawn = (along > 0) & (along <= ARROW_LENGTH * width) & (abs(y * outwards[1] - x * outwards[0]) <= half)
    return _marked(image, drawn & ~mask)


def _mark_width(mask: np.ndarray) -> float:
    return max(1.0, MARK_WIDTH * max(mask.shape))


def _line_around(region: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W) bool outside a region (H, W) bool within the width of a mark."""
    distance = np.asarray(ndimage.distance_transform_edt(~region))  # (H, W) pixels to the region, 0 inside
    return (distance > 0) & (distance <= _mark_width(region))


def _marked(image: np.ndarray, mark: np.ndarray) -> np.ndarray:
    drawn = image.copy()
    drawn[mark] = MARK_COLOUR
    return drawn


def _unit(direction: tuple[int, int]) -> tuple[float, float]:
    return direction[0] / math.hypot(*direction), direction[1] / math.hypot(*direction)


def _border(
    mask: np.ndarray, pixel: tuple[int, int], direction: tuple[int, int]
) -> tuple[float, float] | None:
    """Return the last point (y, x) inside the mask on a ray from a pixel; pixel i covers [i, i + 1].

    Return None if the ray meets no pixel of the mask.
    """
    (y, x), (down, right), steps = pixel, direction, np.arange(max(mask.shape))
    ys, xs = y + down * steps, x + right * steps
    in_image = (ys >= 0) & (ys < mask.shape[0]) & (xs >= 0) & (xs < mask.shape[1])
    hits = np.flatnonzero(mask[ys[in_image], xs[in_image]])
    if not hits.size:
        return None
    return float(ys[hits[-1]] + (1 + down) / 2), float(xs[hits[-1]] + (1 + right) / 2)


def _largest_width(shape: tuple[int, ...], tip: tuple[float, float], outwards: tuple[float, float]) -> float:
    """Return the line width of the largest arrow with this tip and direction in an image of ``shape``."""
    corners = np.array([(ARROW_LENGTH, 0.5), (ARROW_LENGTH, -0.5), (ARROW_HEAD, 2.0), (ARROW_HEAD, -2.0)])
    away = corners @ np.array([outwards, (-outwards[1], outwards[0])])  # (4, 2) from the tip, at width 1
    return float((np.where(away > 0, np.subtract(shape, tip), tip) / abs(away)).min())
