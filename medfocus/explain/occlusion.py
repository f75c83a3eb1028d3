"""Occlusion, for everything that predicts from images (Zeiler and Fergus, arXiv 1311.2901)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu

from medfocus.explain.maps import to_maps

_WINDOWS = 64  # occluded images per pass; bounds the memory


@torch.no_grad()
def occlusion(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    target: int,
    *,
    patch: int,
    stride: int,
    fill: int | tuple[int, int, int],
) -> Tensor:
    """Map how much the prediction of ``target`` falls when a square hides a part of the image.

    The heat of a pixel is the mean fall over all squares that hide the pixel; a rise counts as 0.

    Args:
        predict: Maps images (N, S, S, 3) uint8 to (N, K); the paper uses probabilities.
        image: (S, S, 3) uint8.
        target: The column of ``predict`` to explain.
        patch: Pixels a side of the square.
        stride: Pixels from one square to the next; the last squares end at the image's edge.
        fill: The grey value or RGB of the square, such as ``medfocus.images.geometry.CLIP_MEAN``.

    Returns:
        (1, S, S). Source: Zeiler and Fergus, arXiv 1311.2901.

    Raises ValueError for an image of another shape or type, squares that do not fit or leave gaps, or a
    target without a column.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"occlusion: the image is {tuple(image.shape)} {image.dtype}. Pass (S, S, 3) uint8.")
    height, width = image.shape[:2]
    if height != width or not 1 <= patch <= width or not 1 <= stride <= patch:
        raise ValueError(
            f"occlusion: squares of {patch} px, {stride} px apart, on {height} x {width} px. Use a square "
            "view, a patch no larger than the view, and a stride from 1 to the patch."
        )
    whole = predict(image[None])  # (1, K)
    if whole.ndim != 2 or not 0 <= target < whole.shape[1]:
        raise ValueError(
            f"occlusion: target {target} is not a column of the prediction {tuple(whole.shape)}. Pass a "
            "target below K and a predict that returns (N, K)."
        )
    starts = sorted({*range(0, width - patch + 1, stride), width - patch})
    corners = [(top, left) for top in starts for left in starts]
    heat, hidden = torch.zeros(2, height, width, dtype=torch.float64)
    for first in range(0, len(corners), _WINDOWS):
        batch = corners[first : first + _WINDOWS]
        occluded = image.repeat(len(batch), 1, 1, 1)
        for covered, (top, left) in zip(occluded, batch, strict=True):
            covered[top : top + patch, left : left + patch] = torch.tensor(fill, dtype=torch.uint8)
        falls = relu(whole[0, target] - predict(occluded)[:, target]).tolist()
        for fall, (top, left) in zip(falls, batch, strict=True):
            heat[top : top + patch, left : left + patch] += fall
            hidden[top : top + patch, left : left + patch] += 1
    return to_maps((heat / hidden)[None], width)
