"""Refine a coarse outline by the edges of the image.

SAM2's masks have a quarter of the resolution of its input, so most of a small lesion's mask is its rim.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

RADIUS = 4  # pixels, at the resolution that SAM2 sees: one pixel of its masks
FLATNESS = 1e-3  # variance of brightness in [0, 1]; a window below it has no edge


def along_edges(inside: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Smooth ``inside`` (h, w) in [0, 1], but not across edges of ``grey`` (h, w) in [0, 1].

    This is the guided filter: in every window of 2 ``RADIUS`` + 1 pixels the result is a linear function of
    the brightness, and windows with a variance below ``FLATNESS`` are smoothed. He et al., "Guided Image
    Filtering", ECCV 2010, equations 5, 6 and 8.
    """

    def mean(plane: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(plane, 2 * RADIUS + 1, mode="nearest")

    inside, grey = inside.astype(np.float64), grey.astype(np.float64)
    mean_grey, mean_inside = mean(grey), mean(inside)
    slope = mean(grey * inside) - mean_grey * mean_inside
    slope /= mean(grey * grey) - mean_grey**2 + FLATNESS
    return mean(slope) * grey + mean(mean_inside - slope * mean_grey)
