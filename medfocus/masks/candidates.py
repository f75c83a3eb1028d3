"""Choose an image's mask among candidate regions, without labels. Functions take and return arrays.

A candidate's score is predicted IoU x stability x centrality x (1 - share of the image's border that it
covers). Only candidates within the limits count. If there are none, relaxed limits apply; the later rungs of
the fallback ladder (a box prompt, the whole image) belong to the segmenters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

ISLAND_SHARE = 0.05  # of the largest part; ``tidy`` drops smaller parts, because a crop would include them


@dataclass(frozen=True)
class Limits:
    """Conditions that a candidate has to meet."""

    min_area: float  # share of the image
    max_area: float  # share of the image
    min_iou: float  # predicted IoU, in [0, 1]
    min_stability: float  # in [0, 1]

    def relaxed(self) -> Limits:
        """Return the limits of the second rung: a wider range of areas and any quality."""
        return Limits(self.min_area / 4, (1 + self.max_area) / 2, 0.0, 0.0)


@dataclass(frozen=True)
class Choice:
    """The candidates that form the mask."""

    indices: tuple[int, ...]  # best first
    score: float  # mean over the indices, in [0, 1]
    status: str  # "chosen" or "relaxed"


def stability(logits: np.ndarray, offset: float = 1.0) -> np.ndarray:
    """Measure how stable regions are, as the IoU of logits > offset and logits > -offset.

    Logits (M, h, w) -> (M,) in [0, 1]. This is SAM2's ``calculate_stability_score``, except that an empty
    candidate gets 0 instead of NaN.
    """
    inner = (logits > offset).sum((1, 2))  # (M,)
    outer = (logits > -offset).sum((1, 2))  # (M,)
    return inner / np.maximum(outer, 1)


def centrality(regions: np.ndarray) -> np.ndarray:
    """Measure how central regions are: from 1 in the image's centre to 0 in a corner.

    Regions (M, h, w) bool -> (M,) in [0, 1]; 0 for an empty region. Distances are shares of the image's
    sides, so that its aspect ratio does not matter.
    """
    _, h, w = regions.shape
    area = regions.sum((1, 2))  # (M,)
    y = regions.sum(2) @ ((np.arange(h) + 0.5) / h)  # (M, h) @ (h,)
    x = regions.sum(1) @ ((np.arange(w) + 0.5) / w)  # (M, w) @ (w,)
    safe = np.maximum(area, 1)
    distance = np.hypot(y / safe - 0.5, x / safe - 0.5) / np.sqrt(0.5)  # (M,) in [0, 1]
    return np.where(area > 0, 1 - distance, 0.0)


def border_share(regions: np.ndarray) -> np.ndarray:
    """Return the share of the image's outermost pixels that regions cover: (M, h, w) bool -> (M,)."""
    _, h, w = regions.shape
    frame = np.ones((h, w), dtype=bool)
    frame[1:-1, 1:-1] = False
    return regions[:, frame].mean(1)


def scores(
    regions: np.ndarray, predicted_iou: np.ndarray, steadiness: np.ndarray, *, by_place: bool = True
) -> np.ndarray:
    """Score candidates (M, h, w) bool by predicted IoU (M,) and stability (M,): (M,) in [0, 1].

    A predicted IoU that is not finite counts as 0; others are clipped to [0, 1]. Without ``by_place`` the
    score ignores where a candidate lies.
    """
    quality = np.clip(np.nan_to_num(predicted_iou, nan=0.0, posinf=0.0, neginf=0.0), 0, 1)
    steady = np.clip(np.nan_to_num(steadiness, nan=0.0), 0, 1)
    score = quality * steady
    return score * centrality(regions) * (1 - border_share(regions)) if by_place else score


def pick(
    regions: np.ndarray,
    predicted_iou: np.ndarray,
    steadiness: np.ndarray,
    limits: Limits,
    *,
    keep: int,
    max_overlap: float,
    by_place: bool = True,
) -> tuple[tuple[int, ...], float] | None:
    """Pick the best ``keep`` distinct candidates in the limits; return indices (best first) and mean score.

    Two candidates are distinct if their intersection is at most ``max_overlap`` of the smaller one. A
    candidate's area has to lie within the limits before and after ``tidy``, and the area of the union must
    not exceed them. Among equal scores the first candidate wins. Returns None if no candidate fits.
    """
    if len(regions) == 0:
        return None
    score = scores(regions, predicted_iou, steadiness, by_place=by_place)  # (M,)
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
    by_place: bool = True,
) -> Choice | None:
    """Try the first two rungs of the ladder: ``pick`` within the limits, then within relaxed limits.

    ``regions`` are (M, h, w) bool; the other two arrays are (M,). Returns None if no candidate fits.
    """
    for status, rung in (("chosen", limits), ("relaxed", limits.relaxed())):
        best = pick(
            regions,
            predicted_iou,
            steadiness,
            rung,
            keep=keep,
            max_overlap=max_overlap,
            by_place=by_place,
        )
        if best is not None:
            return Choice(best[0], best[1], status)
    return None


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over the smaller of two regions (h, w) bool; 1 if one contains the other."""
    return float((a & b).sum() / max(1, min(a.sum(), b.sum())))


def agreeing(region: np.ndarray, coords: np.ndarray, labels: np.ndarray) -> int:
    """Count the points on the correct side of a region (h, w) bool.

    ``coords`` (N, 2) are (x, y) in shares of the sides, and ``labels`` (N,) SAM2's: 1 inside, 0 outside.
    """
    height, width = region.shape
    x = (coords[:, 0] * width).astype(int).clip(0, width - 1)
    y = (coords[:, 1] * height).astype(int).clip(0, height - 1)
    return int((region[y, x] == labels).sum())


def connected(region: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the connected parts of a region (h, w) bool from 1; return labels (h, w) int32 and count."""
    labels = np.empty(region.shape, dtype=np.int32)
    return labels, int(ndimage.label(region, output=labels))  # pyright: ignore[reportArgumentType]


def tidy(region: np.ndarray) -> np.ndarray:
    """Fill the holes of a region (h, w) bool and drop parts far smaller than its largest part.

    SAM2 does this in a CUDA extension, and skips it without CUDA. This function fills holes as
    ``scipy.ndimage.binary_fill_holes`` does, in half the time.
    """
    outside, count = connected(~region)
    reaches_border = np.zeros(count + 1, dtype=bool)  # for each part of the outside
    for side in (outside[0], outside[-1], outside[:, 0], outside[:, -1]):
        reaches_border[side] = True
    reaches_border[0] = False  # the region itself
    filled = ~reaches_border[outside]
    labels, count = connected(filled)
    if count < 2:
        return filled
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the outside
    return (sizes >= ISLAND_SHARE * sizes.max())[labels]


def unite(regions: np.ndarray) -> np.ndarray:
    """Tidy the chosen candidates (M, h, w) bool and return their union (h, w) bool."""
    return np.logical_or.reduce([tidy(region) for region in regions])
