"""Maps of attribution and two measures of them: the share inside a region and the pointing game.

A map is (S, S) float32 at the size of the model's view, on the CPU, without negative values and with sum one.
A map without any heat is uniform.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

# The pointing game's 15 pixels, as a share of 500: the longest side of most images of PASCAL VOC.
TOLERANCE = 15 / 500


def to_maps(heat: Tensor, size: int) -> Tensor:
    """Heat (B, G, G) on any grid -> maps (B, size, size).

    Negative heat counts as 0. Raises ValueError for heat that is not finite.
    """
    if not heat.isfinite().all():
        raise ValueError("attribution: NaN or infinite values. Check the model's weights and the score.")
    positive = heat.detach().cpu().double().clamp(min=0)[:, None]  # (B, 1, G, G)
    maps = interpolate(positive, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    total = maps.sum(dim=(1, 2), keepdim=True)
    return torch.where(total > 0, maps / total, 1 / size**2).float()


def inside_share(attribution: np.ndarray | Tensor, mask: np.ndarray | Tensor) -> float:
    """Return the share of a map (S, S) inside ``mask`` (S, S) bool, in the same frame.

    Compare it with the mask's share of the image, which is the result for a uniform map. Raises ValueError
    for different shapes, for a mask that is empty or not bool, and for a map with negative, infinite or only
    zero values.
    """
    heat, inside = _in_one_frame("inside_share", attribution, mask)
    return float(heat[inside].sum() / heat.sum())


def pointing_hit(
    attribution: np.ndarray | Tensor, region: np.ndarray | Tensor, tolerance: float = TOLERANCE
) -> bool:
    """Play the pointing game: return whether the map's maximum is within ``tolerance`` of the region.

    If several pixels have the maximum, the pixel nearest to their centre counts. A uniform map misses.

    Args:
        attribution: (S, S).
        region: (S, S) bool, in the same frame.
        tolerance: Largest distance, as a share of the side.

    Source: Zhang et al., arXiv 1608.00507. Raises ValueError as ``inside_share`` does, or for a tolerance
    outside [0, 1).
    """
    heat, inside = _in_one_frame("pointing_hit", attribution, region)
    if not 0 <= tolerance < 1:
        raise ValueError(f"pointing_hit: the tolerance is {tolerance}. Use a share of the side in [0, 1).")
    maxima = np.argwhere(heat == heat.max())  # (M, 2)
    if len(maxima) == heat.size:
        return False
    point = maxima[np.hypot(*(maxima - maxima.mean(axis=0)).T).argmin()]
    distance = np.hypot(*(np.argwhere(inside) - point).T).min()
    return bool(distance <= tolerance * max(heat.shape))


def _in_one_frame(
    caller: str, attribution: np.ndarray | Tensor, mask: np.ndarray | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    heat, inside = np.asarray(attribution, dtype=np.float64), np.asarray(mask)
    if heat.ndim != 2 or heat.shape != inside.shape:
        raise ValueError(
            f"{caller}: the attribution is {heat.shape} and the mask {inside.shape}. Bring both to the "
            "view's frame, (S, S)."
        )
    if inside.dtype != bool:
        raise ValueError(f"{caller}: the mask is {inside.dtype}. Pass True inside the region (mask > 0).")
    if not inside.any():
        raise ValueError(f"{caller}: the mask is empty. Leave this image out.")
    if not np.isfinite(heat).all() or heat.min() < 0 or heat.sum() <= 0:
        raise ValueError(
            f"{caller}: the attribution has negative, infinite or only zero values. Pass a result of to_maps."
        )
    return heat, inside
