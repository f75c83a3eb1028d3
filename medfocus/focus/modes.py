"""How a mask becomes a visual prompt: x_s = x ⊙ m and its kin. Image and mask in, image out.

Outside of the mask stands CLIP's mean colour, which is 0 after its normalisation; black would be -1.8
standard deviations. A soft edge lies outside of the mask, so that what is inside stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from medfocus.masks.candidates import connected

# The mean of CLIP's training images in 8 bits: 255 * (0.48145466, 0.4578275, 0.40821073).
FILL = (123, 117, 104)
# Easily told apart on grey and from each other: red, azure, yellow, magenta, green, orange.
SEGMENT_COLOURS = ((230, 30, 40), (0, 140, 255), (250, 210, 0), (215, 60, 215), (40, 190, 70), (255, 130, 0))
TINT = 0.35  # opacity of a tinted segment
MARK_COLOUR = (255, 0, 0)  # red marks were found to draw CLIP's attention, arXiv 2304.06712
MARK_WIDTH = 3 / 224  # of the longest side: 3 pixels of what CLIP sees
ARROW_LENGTH, ARROW_HEAD = 12, 4  # in widths of the mark: the arrow, and its head, as broad as it is long
# (down, right); where two have the same room, the first is taken.
DIRECTIONS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1))
BLUR_SIGMA = 0.04  # of the longest side: shapes stay, texture goes


def focus(image: np.ndarray, mask: np.ndarray, mode: str, *, feather: float) -> np.ndarray:
    """Apply one of ``FOCUS`` to an image at its own resolution.

    An empty mask is read as the whole image, m = 1, the last rung of the masks' ladder: an image
    without a region must not become a blank one, which would tell of the mask and nothing else. Only
    "inverse" makes it one, as the whole image has no background.

    Args:
        image: (H, W, 3) uint8 RGB; never written to.
        mask: (H, W) bool, True inside the region.
        mode: A key of FOCUS.
        feather: Width of the soft edge as a share of the image's longest side, in [0, 0.5];
            "multiply", "inverse", "binary" and "blur" have one.

    Returns:
        (H, W, 3) uint8; "crop" gives (H', W', 3), "none" the image itself.

    Raises:
        ValueError: An unknown mode, or an image, mask or feather of another kind.
    """
    if mode not in FOCUS:
        raise ValueError(f"Unknown focus {mode!r}; known: {', '.join(FOCUS)}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"The image is {image.dtype} of {image.shape}; focus takes (H, W, 3) uint8.")
    if mask.shape != image.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f"The mask is {mask.dtype} of {mask.shape}; this image's is bool of {image.shape[:2]}."
        )
    if not 0 <= feather <= 0.5:
        raise ValueError(f"feather is {feather}; use a share of the longest side in [0, 0.5].")
    return FOCUS[mode](image, mask if mask.any() else np.ones_like(mask), feather)


def none(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The image itself: the row that shows what the focus is worth."""
    return image


def multiply(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The paper's x ⊙ m: the image inside, CLIP's mean colour outside."""
    return _blend(image, Image.new("RGB", image.shape[1::-1], FILL), soft_edge(mask, feather))


def inverse(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The background alone, x ⊙ (1 - m), a control: CLIP's mean colour inside and, softly, around the mask.

    Under a full mask nothing is left but that colour. The hole still has the mask's shape; what that
    gives away by itself, "binary" shows.
    """
    return _blend(image, Image.new("RGB", image.shape[1::-1], FILL), 255 - soft_edge(mask, feather))


def overlay(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The paper's Figure 1: each segment (connected part of the mask) tinted, the largest in red."""
    labels, count = connected(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    colour_of = np.zeros((count + 1, 3), dtype=np.uint8)
    for rank, part in enumerate(np.argsort(-sizes, kind="stable")):
        colour_of[1 + part] = SEGMENT_COLOURS[rank % len(SEGMENT_COLOURS)]
    tinted = np.where(mask, np.uint8(round(255 * (1 - TINT))), np.uint8(255))
    return _blend(image, Image.fromarray(colour_of[labels]), tinted)


def binary(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The silhouette alone, white on black: what the mask's shape gives away by itself."""
    return np.repeat(soft_edge(mask, feather)[:, :, None], 3, axis=2)


def crop(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The square around the mask's box (w, h), half side max(.5w, .5h, .2W, .2H), cut off at the image."""
    height, width = mask.shape
    top, bottom, left, right = _bounds(mask)
    half = max(0.5 * (right - left), 0.5 * (bottom - top), 0.2 * width, 0.2 * height)
    y, x = (top + bottom) / 2, (left + right) / 2
    rows = slice(max(0, math.floor(y - half)), math.ceil(y + half))
    columns = slice(max(0, math.floor(x - half)), math.ceil(x + half))
    return image[rows, columns].copy()


def blur(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """The image inside, a blurred one outside: where it lies is still told, what it is no longer."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR_SIGMA * max(mask.shape)))
    return _blend(image, blurred, soft_edge(mask, feather))


def contour(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """A red line around the mask, drawn outside of it so that it hides nothing of the region."""
    return _marked(image, _line_around(mask))


def circle(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """A red ellipse around the mask: the smallest with the centre and proportions of the mask's box.

    Like "contour" and "box" it lies outside of the region, is cut off where the image ends, and around
    the whole image is not to be seen.
    """
    top, bottom, left, right = _bounds(mask)
    y = np.abs(np.arange(mask.shape[0])[:, None] - (top + bottom - 1) / 2)  # (H, 1) from the centre
    x = np.abs(np.arange(mask.shape[1]) - (left + right - 1) / 2)  # (W,)
    down, across = (bottom - top) / 2, (right - left) / 2  # the half axes of the ellipse inside the box
    farthest = (((y + 0.5) / down) ** 2 + ((x + 0.5) / across) ** 2)[mask].max()  # corner of a pixel
    return _marked(image, _line_around((y / down) ** 2 + (x / across) ** 2 <= farthest))


def box(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """A red rectangle around the mask: its bounding box."""
    top, bottom, left, right = _bounds(mask)
    inside = np.zeros_like(mask)
    inside[top:bottom, left:right] = True
    return _marked(image, _line_around(inside))


def arrow(image: np.ndarray, mask: np.ndarray, feather: float) -> np.ndarray:
    """A red arrow that points at the centre of the mask's largest part, its tip on the mask's border.

    Of eight directions it comes from that where the image has room for the largest. It is 36 pixels of
    what CLIP sees, smaller where there is less room, and around the whole image there is none.
    """
    labels, _ = connected(mask)
    top, bottom, left, right = _bounds(labels == 1 + np.bincount(labels.ravel())[1:].argmax())
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


FOCUS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
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
    """(H, W) bool -> (H, W) uint8: 255 inside, falling to 0 over ``feather`` times the longest side outside.

    Twice the share of the mask in a square window, which along a straight edge is linear. Counted in
    integers, so that it is the same for a turned image to the last bit.
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


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box of a mask that is not empty: top, bottom, left, right, the second and fourth exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1


def _mark_width(mask: np.ndarray) -> float:
    return max(1.0, MARK_WIDTH * max(mask.shape))


def _line_around(region: np.ndarray) -> np.ndarray:
    """The pixels outside of a region that are no farther from it than a mark is wide: (H, W) bool, both."""
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
    """The point (y, x) where a ray from a pixel leaves the mask for good, pixel i being [i, i + 1].

    None where the ray meets no pixel of the mask.
    """
    (y, x), (down, right), steps = pixel, direction, np.arange(max(mask.shape))
    ys, xs = y + down * steps, x + right * steps
    there = (ys >= 0) & (ys < mask.shape[0]) & (xs >= 0) & (xs < mask.shape[1])
    met = np.flatnonzero(mask[ys[there], xs[there]])
    if not met.size:
        return None
    return float(ys[met[-1]] + (1 + down) / 2), float(xs[met[-1]] + (1 + right) / 2)


def _largest_width(shape: tuple[int, ...], tip: tuple[float, float], outwards: tuple[float, float]) -> float:
    """The width of line of the largest arrow inside an image of ``shape`` with this tip and direction."""
    corners = np.array([(ARROW_LENGTH, 0.5), (ARROW_LENGTH, -0.5), (ARROW_HEAD, 2.0), (ARROW_HEAD, -2.0)])
    away = corners @ np.array([outwards, (-outwards[1], outwards[0])])  # (4, 2) from the tip, at width 1
    return float((np.where(away > 0, np.subtract(shape, tip), tip) / abs(away)).min())


def _blend(inside: np.ndarray, outside: Image.Image, weight: np.ndarray) -> np.ndarray:
    """``inside`` where ``weight`` (H, W) uint8 is 255, ``outside`` where it is 0, a mix between them."""
    return np.array(Image.composite(Image.fromarray(inside), outside, Image.fromarray(weight)))
