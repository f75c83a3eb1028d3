"""A segmenter without weights: Otsu's threshold and the largest parts near the centre.

It needs no SAM2 checkpoint, and it knows no anatomy: it treats dark lungs, a bright head and a dark lesion
alike, as a large part that does not touch the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from PIL import Image
from scipy import ndimage

from medfocus.images.geometry import grey
from medfocus.masks import candidates
from medfocus.masks.segmenter import Mask, check_image, identity, segmenter_key
from medfocus.masks.settings import OtsuSettings

WORKING_SIZE = 256  # pixels of the longest side of the image that is searched for regions
MAX_PARTS = 32  # candidates: the largest connected parts, half of them on each side of the threshold


class OtsuSegmenter:
    """One mask per image by thresholding. The fallback ladder has no rung "box"."""

    sam2 = None  # see ``Segmenter.sam2``

    def __init__(self, settings: OtsuSettings = OtsuSettings()) -> None:  # noqa: B008  # frozen
        self.settings = settings
        self.key = segmenter_key(OtsuSegmenter, **asdict(settings))

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Segment images (H, W, 3) uint8 RGB of any sizes: one mask per image, in their order."""
        return [self._mask(check_image(image)) for image in images]

    def _mask(self, image: np.ndarray) -> Mask:
        height, width = image.shape[:2]
        small = _shrunk(grey(image))  # (h, w)
        threshold, contrast = otsu_threshold(small)
        regions = _parts(small > threshold)  # (M, h, w)
        area = regions.sum((1, 2))  # (M,)
        quality = contrast * np.sqrt(area / area.max(initial=1))  # (M,) largest is best
        choice = candidates.choose(
            regions,
            quality,
            np.ones(len(regions)),
            self.settings.limits,
            keep=self.settings.keep,
            max_overlap=self.settings.max_overlap,
        )
        if choice is not None:
            union = Image.fromarray(candidates.unite(regions[list(choice.indices)]).astype(np.float32))
            region = np.asarray(union.resize((width, height), Image.Resampling.BILINEAR)) > 0.5
            if region.any():
                return Mask(region, choice.score, choice.status)
        return identity(height, width)


def otsu_threshold(values: np.ndarray) -> tuple[float, float]:
    """Find the threshold that best separates grey values in [0, 1] into two classes.

    Returns the threshold and its separability in [0, 1], which is the share of the variance between the
    classes. For a constant image, returns its value and 0. Otsu 1979, doi 10.1109/TSMC.1979.4310076.
    """
    histogram, edges = np.histogram(values, bins=256, range=(0, 1))
    share = histogram / histogram.sum()  # (256,)
    centres = (edges[:-1] + edges[1:]) / 2
    below = share.cumsum()  # (256,) share of pixels at or below each bin
    mean_below = (share * centres).cumsum()
    mean = mean_below[-1]
    variance = (share * (centres - mean) ** 2).sum()
    if variance <= 0:
        return float(values.flat[0]), 0.0
    # Otsu's equation 18, for every threshold at once: (256,)
    between = (mean * below - mean_below) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best = int(between.argmax())
    return float(edges[best + 1]), float(min(1.0, between[best] / variance))


def _shrunk(values: np.ndarray) -> np.ndarray:
    """Shrink (H, W) float32 to WORKING_SIZE and smooth it, so that noise forms no parts."""
    height, width = values.shape
    scale = min(1.0, WORKING_SIZE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
    return ndimage.gaussian_filter(small, sigma=max(small.shape) / 128)


def _parts(bright: np.ndarray) -> np.ndarray:
    """Return the largest connected parts (M, h, w) bool of a region (h, w) bool and of its complement."""
    parts: list[np.ndarray] = []
    for side in (bright, ~bright):
        labels, count = candidates.connected(side)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        parts += [labels == 1 + i for i in np.argsort(-sizes, kind="stable")[: MAX_PARTS // 2]]
    return np.stack(parts)
