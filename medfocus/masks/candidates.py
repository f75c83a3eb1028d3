"""Many candidate regions -> the one mask of an image, without labels.

Arrays in, arrays out. A candidate's score is predicted IoU x stability x centrality x
(1 - share of the image's border that it covers); only candidates whose area lies between two
limits count. Where the strict limits leave nothing, relaxed ones are tried; what comes after
them (a box prompt, the whole image) is the segmenter's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

ISLAND_SHARE = 0.05  # islands below this share of the largest one are dropped: a crop would frame them


@dataclass(frozen=True)
class Limits:
    """What a candidate has to fulfil to count."""

    min_area: float  # share of the image
    max_area: float  # share of the image
    min_iou: float  # predicted IoU, in [0, 1]
    min_stability: float  # in [0, 1]

    def relaxed(self) -> Limits:
        """The second rung: a quarter of the least area, half of the rest on top, any quality."""
        return Limits(self.min_area / 4, (1 + self.max_area) / 2, 0.0, 0.0)


@dataclass(frozen=True)
class Choice:
    """Which candidates make the mask."""

    indices: tuple[int, ...]  # best first
    score: float  # mean over the indices, in [0, 1]
    status: str  # "chosen" or "relaxed"


def stability(logits: np.ndarray, offset: float = 1.0) -> np.ndarray:
    """How little a region changes with its threshold: IoU of logits > offset and logits > -offset.

    SAM2's ``calculate_stability_score``, except that a candidate without a pixel gets 0, not NaN.
    (M, h, w) float -> (M,) float in [0, 1].
    """
    inner = (logits > offset).sum((1, 2))  # (M,)
    outer = (logits > -offset).sum((1, 2))  # (M,)
    return inner / np.maximum(outer, 1)


def centrality(regions: np.ndarray) -> np.ndarray:
    """1 for a region whose centre of mass is the image's centre, falling to 0 in a corner.

    Distances are measured in sides of the image, so that its aspect ratio does not matter.
    (M, h, w) bool -> (M,) float in [0, 1]; 0 for an empty region.
    """
    _, h, w = regions.shape
    area = regions.sum((1, 2))  # (M,)
    y = regions.sum(2) @ ((np.arange(h) + 0.5) / h)  # (M, h) @ (h,)
    x = regions.sum(1) @ ((np.arange(w) + 0.5) / w)  # (M, w) @ (w,)
    safe = np.maximum(area, 1)
    distance = np.hypot(y / safe - 0.5, x / safe - 0.5) / np.sqrt(0.5)  # (M,) in [0, 1]
    return np.where(area > 0, 1 - distance, 0.0)


def border_share(regions: np.ndarray) -> np.ndarray:
    """Share of the image's outermost pixels that a region covers. (M, h, w) bool -> (M,) in [0, 1]."""
    _, h, w = regions.shape
    frame = np.ones((h, w), dtype=bool)
    frame[1:-1, 1:-1] = False
    return regions[:, frame].mean(1)


def scores(regions: np.ndarray, predicted_iou: np.ndarray, steadiness: np.ndarray) -> np.ndarray:
    """Candidates (M, h, w) bool, their predicted IoU (M,) and stability (M,) -> scores (M,) in [0, 1].

    A predicted IoU that is not a number, or lies outside of [0, 1], counts as 0 or is clipped.
    """
    quality = np.clip(np.nan_to_num(predicted_iou, nan=0.0, posinf=0.0, neginf=0.0), 0, 1)
    steady = np.clip(np.nan_to_num(steadiness, nan=0.0), 0, 1)
    return quality * steady * centrality(regions) * (1 - border_share(regions))


def pick(
    regions: np.ndarray,
    predicted_iou: np.ndarray,
    steadiness: np.ndarray,
    limits: Limits,
    *,
    keep: int,
    max_overlap: float,
) -> tuple[tuple[int, ...], float] | None:
    """One rung: the best ``keep`` distinct candidates within the limits, best first, and their mean score.

    Two candidates are distinct when their intersection is at most ``max_overlap`` of the smaller one.
    The area has to fit before and after ``tidy``, and that of the union too. Ties go to the first
    candidate. None when no candidate fits.
    """
    if len(regions) == 0:
        return None
    score = scores(regions, predicted_iou, steadiness)  # (M,)
    area = regions.mean((1, 2))  # (M,)
    fits = (area >= limits.min_area) & (area <= limits.max_area) & (score > 0)
    fits &= (predicted_iou >= limits.min_iou) & (steadiness >= limits.min_stability)
    taken: list[int] = []
    tidied: list[np.ndarray] = []
    for index in np.argsort(-score, kind="stable"):
        if not fits[index]:
            continue
        region = tidy(regions[index])
        if not limits.min_area <= region.mean() <= limits.max_area:
            continue
        union = np.logical_or.reduce([region, *tidied]).mean()
        if union <= limits.max_area and all(overlap(region, other) <= max_overlap for other in tidied):
            taken.append(int(index))
            tidied.append(region)
        if len(taken) == keep:
            break
    return (tuple(taken), float(score[taken].mean())) if taken else None


def choose(
    regions: np.ndarray,
    predicted_iou: np.ndarray,
    steadiness: np.ndarray,
    limits: Limits,
    *,
    keep: int,
    max_overlap: float,
) -> Choice | None:
    """The first two rungs of the ladder: candidates within the limits, else within relaxed ones, else None.

    ``regions`` (M, h, w) bool, ``predicted_iou`` (M,), ``steadiness`` (M,); see ``pick``.
    """
    for status, rung in (("chosen", limits), ("relaxed", limits.relaxed())):
        best = pick(regions, predicted_iou, steadiness, rung, keep=keep, max_overlap=max_overlap)
        if best is not None:
            return Choice(best[0], best[1], status)
    return None


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over the smaller of two regions (h, w) bool; 1 where one lies inside the other."""
    return float((a & b).sum() / max(1, min(a.sum(), b.sum())))


def connected(region: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the connected parts of a region (h, w) bool from 1: their map (h, w) int32, and how many."""
    labels = np.empty(region.shape, dtype=np.int32)
    return labels, int(ndimage.label(region, output=labels))  # pyright: ignore[reportArgumentType]


def tidy(region: np.ndarray) -> np.ndarray:
    """Fill the holes of a region (h, w) bool and drop islands far smaller than its largest part.

    SAM2 leaves both to a CUDA extension and skips them without it. Twice as fast here as
    ``scipy.ndimage.binary_fill_holes``, with the same result.
    """
    outside, count = connected(~region)
    open_air = np.zeros(count + 1, dtype=bool)  # the parts of the outside that reach the border
    for side in (outside[0], outside[-1], outside[:, 0], outside[:, -1]):
        open_air[side] = True
    open_air[0] = False  # the region itself
    filled = ~open_air[outside]
    labels, count = connected(filled)
    if count < 2:
        return filled
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the outside
    return (sizes >= ISLAND_SHARE * sizes.max())[labels]


def unite(regions: np.ndarray) -> np.ndarray:
    """The chosen candidates (M, h, w) bool -> their union (h, w) bool, each tidied first."""
    return np.logical_or.reduce([tidy(region) for region in regions])
