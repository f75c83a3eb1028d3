"""A coarse outline, moved to where the image changes. Arrays in, arrays out.

SAM2's masks have a quarter of its image's sides, so of a small lesion most is rim.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

RADIUS = 4  # pixels of the windows: one cell of the masks, at the resolution that SAM2 sees
FLATNESS = 1e-3  # variance of brightness in [0, 1] under which a window has no edge


def along_edges(inside: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """The guided filter: ``inside`` (h, w) in [0, 1] smoothed, but not across edges of ``grey`` (h, w).

    In every window of 2 ``RADIUS`` + 1 pixels the result is a line in the brightness, which is in [0, 1];
    windows whose variance is under ``FLATNESS`` are smoothed. He et al., "Guided Image Filtering", ECCV 2010,
    equations 5, 6 and 8.
    """

    def mean(plane: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(plane, 2 * RADIUS + 1, mode="nearest")

    inside, grey = inside.astype(np.float64), grey.astype(np.float64)
    mean_grey, mean_inside = mean(grey), mean(inside)
    slope = mean(grey * inside) - mean_grey * mean_inside
    slope /= mean(grey * grey) - mean_grey**2 + FLATNESS
    return mean(slope) * grey + mean(mean_inside - slope * mean_grey)
